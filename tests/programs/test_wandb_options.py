"""Weights & Biases: the options and environment variables that a user gives, and the rules of W&B for them."""

import re
import sys
from typing import Any

import pytest

from anomalib_lite.tracking import wandb_logger
from tests.helpers import run_programs as runs
from tests.helpers import wandb_file
from tests.programs import test_wandb
from tests.programs.test_wandb import train

own_home, root = test_wandb.own_home, test_wandb.root  # fixtures

#: {option or variable: what the line says}, by the rules of wandb.Settings and wandb.init
REFUSED = {
    "+logger.wandb.colour=red": "logger.wandb.colour: wandb.init has no such argument; remove it",
    "+logger.wandb.id=mine": "logger.wandb.id: the run sets it itself; remove it",
    "+logger.wandb.save_code=maybe": "W&B: save_code=maybe: .*bool",
    "WANDB_PROJECT=a/b": "W&B: .*'a/b'.*; correct logger.wandb or W&B's environment variables",
    "WANDB_MODE=on": "W&B: mode=on: .*'online'",
    "WANDB_TAGS=a,,b": "W&B: run_tags=.*empty",
    "WANDB_RUN_ID=a/b": "W&B: Run ID cannot contain",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_wandb_refuses(given, root, tmp_path, monkeypatch):
    """One line before training, instead of a run that is missing in W&B; the folder takes the corrected run."""
    key, _, value = given.partition("=")
    more = [given] * (not key.isupper())
    if key.isupper():
        monkeypatch.setenv(key, value)
    text = train(tmp_path / "run", root, "method=norm_occ_closed_form", *more, code=2)
    assert re.search("error: .*" + REFUSED[given], text)
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.delenv(key, raising=False)


NUMBERS = {
    "name": "1", "group": "20240101", "project": "1e3", "+job_type": "true", "+notes": "[a", "entity": "0x10",
}  # fmt: skip


def test_numbers_become_text(root, tmp_path):
    """As typed, also within the tags."""
    given = [f"{'+' * key.startswith('+')}logger.wandb.{key.lstrip('+')}={value}" for key, value in NUMBERS.items()]
    train(tmp_path / "run", root, "method=norm_occ_closed_form", *given, "logger.wandb.tags=[1,1e3,true,a]")
    (folder,) = wandb_file.folders(tmp_path / "run")
    run = wandb_file.read(folder)["run"]
    assert [run.display_name, run.run_group, run.project, run.job_type, run.notes, run.entity] == [*NUMBERS.values()]
    assert list(run.tags) == ["1", "1e3", "true", "a"]


@pytest.mark.parametrize("how", ["option", "WANDB_MODE=disabled", "WANDB_DISABLED=true", "WANDB_DISABLED=1"])
def test_disabled_it_is_not_even_imported(tmp_path, monkeypatch, how):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    if "=" in how:
        monkeypatch.setenv(*how.split("="))
    logger = wandb_logger.WandbRun(str(tmp_path), mode="disabled" if how == "option" else "auto")
    data: Any = None
    logger.start({}, {}, data)
    assert (logger.failed, logger.run) == (False, None)
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_sweep(root, tmp_path):
    """What differs between the jobs stands in their names, as in the rows of `compare`."""
    outcome = runs.train(
        "-m", "hydra/launcher=basic", "logger=default", "method=norm_occ_closed_form", *runs.folder_data(root),
        "method.norm=0.1,0.2", "scoring.image_score=max,mean", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = [wandb_file.read(folder) for n in range(4) for folder in wandb_file.folders(tmp_path / "sweep" / str(n))]
    assert [made["run"].display_name for made in found] == [
        f"norm_occ_closed_form (norm={norm}, image_score={score}) bottle seed 0"
        for norm in (0.1, 0.2)
        for score in ("max", "mean")
    ]
