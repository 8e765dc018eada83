"""A run that is killed at any moment and started again ends as if nothing had happened, bit for bit."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import artifacts as results
from anomalib_lite.runs import folder
from anomalib_lite.runs.folder import is_finished
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after, logged, until
from tests.helpers.ranks import PROCESSES

CONFIG = """
# @package _global_
defaults:
  - override /backbone: none
method:
  _target_: {module}.{name}
  pause: 0.0
  optimizer: {{_target_: torch.optim.Adam, _partial_: true, lr: 1e-2}}
  scheduler: {{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 2, gamma: 0.7}}
data:
  batch_size: 4
  augment: [{{_target_: albumentations.HorizontalFlip}}]
trainer:
  max_epochs: 3
"""
EPOCH, STEPS = 3, 9  # 10 images in batches of 4, three epochs
FREE = {"timing", "environment", "overrides", "cache"}


class Noisy(AnomalyModule):
    """Needs every random number there is in its training step: torch's, NumPy's and Python's."""

    def __init__(self, pause: float = 0.0, **context: Any):
        super().__init__(**context)
        self.pause = pause
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(8, 12, 1),
            nn.PixelShuffle(2),
        )

    def loss(self, batch):
        images = batch["image"]
        noisy = images + 0.1 * torch.randn_like(images) + 0.1 * float(np.random.normal())  # noqa: NPY002
        return (self.net(noisy) - random.uniform(0.9, 1.1) * images).square().mean()

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        return self.loss(batch)

    def held_out_loss(self, batch):
        return (self.net(batch["image"]) - batch["image"]).square().mean((1, 2, 3))

    def anomaly_map(self, batch):
        return (self.net(batch["image"]) - batch["image"]).square().mean(1)


class TwoOptimizers(Noisy):
    """Steps its optimizers itself, each for half of the network, and one of them only every second batch."""

    def __init__(self, **context: Any):
        super().__init__(**context)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net[:2], self.net[2:])]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        first, second = self.optimizers()  # type: ignore[attr-defined]
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        return loss


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, train=10)
    return root


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """A folder with the methods of this file."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "method").mkdir()
    for method in (Noisy, TwoOptimizers):
        file = folder / "method" / f"{method.__name__.lower()}.yaml"
        file.write_text(CONFIG.format(module=__name__, name=method.__name__))
    return folder


@pytest.fixture(scope="module")
def arguments(root, conf):
    """(run's folder, more) -> the command line."""

    def make(run: Path, *more: str, method: str = "noisy") -> list[str]:
        return [
            f"--config-dir={conf}", "hardware=cpu", "logger=csv", f"method={method}", *runs.folder_data(root),
            "data.image_size=32", "trainer.log_every=1", "trainer.checkpoint_minutes=0",
            "hardware.measure_cost=false", *more, f"hydra.run.dir={run}",
        ]  # fmt: skip

    return make


def finish(arguments: list[str]) -> None:
    runs.succeeded(runs.train(*arguments, small=False))


def interrupt(arguments: list[str], stop_at: int) -> None:
    with interrupted_after(stop_at):
        runs.train(*arguments, small=False)


def assert_undisturbed(found: Path, expected: Path) -> None:
    """Nothing that a run leaves behind depends on interruptions."""
    assert_same_run(found, expected)
    one, two = results.read_result(found), results.read_result(expected)
    assert one["timing"]["steps"] == two["timing"]["steps"]
    assert {key: one[key] for key in one.keys() - FREE} == {key: two[key] for key in two.keys() - FREE}


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """(method, budget) -> the folder of a run without interruption, made once."""

    @cache
    def get(*more: str, method: str = "noisy") -> Path:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        finish(arguments(run, *more, "trainer.checkpoint_minutes=5", method=method))
        return run

    return get


@pytest.fixture
def resumed(arguments, undisturbed, tmp_path):
    """(batches after which the run stops) -> the folder of the run, which is continued after each stop."""

    def get(*stops: int, options: Sequence[str] = (), method: str = "noisy") -> Path:
        run = tmp_path / "run"
        for stop_at in stops:
            interrupt(arguments(run, *options, *(["resume=true"] if run.exists() else []), method=method), stop_at)
        finish(arguments(run, *options, "resume=true", method=method))
        assert_undisturbed(run, undisturbed(*options, method=method))
        return run

    return get


# --- at every batch, in this process ---


@pytest.mark.parametrize("stop_at", [STEPS, 0])
def test_stopped_once(resumed, stop_at):
    """At the last batch, and (0) when all is trained and testing begins."""
    rows = runs.rows_of(resumed(stop_at) / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("stop_at", "budget"),
    [
        (0, ["trainer.max_steps=7"]),
        (6, ["trainer.max_epochs=null", "trainer.max_steps=7"]),
        (7, ["trainer.max_epochs=null", "trainer.max_steps=7"]),
    ],
)
def test_a_budget_that_ends_within_an_epoch(resumed, stop_at, budget):
    assert results.read_result(resumed(stop_at, options=budget))["timing"]["steps"] == 7


def test_a_budget_of_steps_that_ends_with_an_epoch(resumed):
    resumed(0, options=["trainer.max_epochs=null", "trainer.max_steps=6"])


def test_a_method_that_steps_its_own_optimizers(resumed):
    run = resumed(1, EPOCH, STEPS - 1, method="twooptimizers")
    assert results.read_result(run)["timing"]["steps"] == STEPS


def test_with_loader_processes(arguments, undisturbed, tmp_path):
    run = tmp_path / "run"
    interrupt(arguments(run, "data.workers=1"), 2)
    interrupt(arguments(run, "data.workers=1", "resume=true"), EPOCH)
    finish(arguments(run, "data.workers=1", "resume=true"))
    assert_undisturbed(run, undisturbed())


def test_with_losses_of_held_out_images(resumed):
    """2 batches of 4 images an epoch; the loss is logged before the checkpoint of the epoch's last batch."""
    rows = runs.rows_of(resumed(1, 2, 6, options=["data.val_fraction=0.2"]) / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["held_out_loss"]] == [2, 4, 6]


def test_stopped_again_and_again(resumed):
    """Also at the ends of several epochs: Lightning's count of them then lags in the epochs that follow."""
    resumed(1, 3, 6, 9, 10, options=["trainer.max_epochs=5"])


@pytest.fixture
def copied(interrupted, tmp_path):
    """A copy of the folder of the interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "run")


def test_other_hardware_and_logging_may_change(arguments, undisturbed, copied):
    changed = ("trainer.checkpoint_minutes=5", "data.check=thorough", "hardware.feature_memory_gb=1", "debug=true")
    finish(arguments(copied, "resume=true", *changed))
    assert_undisturbed(copied, undisturbed())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=1", "data.seed=1|seed=1"),
        ("data.image_size=48", "data.image_size=48"),
        ("method.optimizer.lr=0.1", r"method\.optimizer\.lr=0\.1"),
        ("trainer.max_epochs=4", "trainer.max_epochs=4"),
        ("+method.more=1", "method.more=1"),
        ("scoring.pixel_smooth=null", "scoring.pixel_smooth=None"),
    ],
)
def test_a_changed_configuration_is_refused_by_its_key(arguments, interrupted, change, key):
    before = (interrupted / "checkpoints" / "last.ckpt").read_bytes()
    outcome = runs.train(*arguments(interrupted, "resume=true", change), small=False)
    assert outcome.code == 2
    assert re.fullmatch(rf"error: ({key}) but the run in .* was started with .*\n", outcome.err)
    assert (interrupted / "checkpoints" / "last.ckpt").read_bytes() == before


def test_resume_alone(undisturbed, copied):
    """The run's folder is enough; keys that may change are given besides, others are refused by name."""
    alone = ("resume=true", f"hydra.run.dir={copied}")
    outcome = runs.train(*alone, "seed=1", small=False)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: seed=1 but the run in")
    other = ("hardware=cpu", "hardware.measure_cost=false", "data.eval_batch_size=3", "trainer.checkpoint_minutes=5")
    finish([*alone, *other])
    assert_undisturbed(copied, undisturbed())
    result = results.read_result(copied)
    assert {"method=noisy", "data.eval_batch_size=3"} <= set(result["overrides"])
    assert json.loads((copied / "checkpoints" / "config.json").read_text())["names"]["method"] == "noisy"


def test_stored_values_win_over_a_group_that_is_chosen_anew(tmp_path):
    """As on one command line. A value that is given again wins over both; devices and keys without a place go."""
    auto = {"devices": 1, "precision": "auto", "deterministic": "auto", "threads": None}
    hardware = auto | {"devices": 8, "precision": 32, "deterministic": True, "threads": 2}
    logger = {"csv": {"old": 1}, "wandb": {"project": "mine", "notes": "more"}}
    same = ["seed=3", "hardware.precision=32", "hardware.deterministic=true", "logger.wandb.project=mine"]
    same += ["+logger.wandb.notes=more"]
    stored = {"config": {"seed": 3, "data": {}, "hardware": hardware, "logger": logger}, "names": {"method": "noisy"}}
    for name, content in (
        ("checkpoints/config.json", stored),
        (
            ".hydra/overrides.yaml",
            [*same, "hardware=cpu", "hardware.devices=8", "hardware.threads=2", "logger.csv.old=1"],
        ),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    given = ["resume=true", "hardware=ddp", "hardware.threads=1", "logger=default"]
    composed = {
        "resume": True, "seed": 0, "data": {}, "hardware": auto | {"devices": "auto", "threads": 1},
        "logger": {"csv": {}, "wandb": {"project": None}},
    }  # fmt: skip
    config, names, overrides = folder.resumed(tmp_path, composed, {"method": "norm_occ"}, given)
    assert config["hardware"] == {"devices": "auto", "precision": 32, "deterministic": True, "threads": 1}
    assert config["logger"] == {"csv": {}, "wandb": {"project": "mine", "notes": "more"}}
    assert (config["seed"], names) == (3, {"method": "noisy"})
    assert overrides == [*same, *given]


def test_the_stored_command_line_is_read_in_any_locale(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- data.root=/Böses\n", encoding="utf-8")
    code = "import sys; from pathlib import Path; from anomalib_lite.runs import folder\n"
    code += "print(ascii(folder._stored_overrides(Path(sys.argv[1]))))"
    plain = {"cwd": runs.ROOT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    outcome = runs.python("-c", code, tmp_path, **plain)  # type: ignore[arg-type]
    assert outcome.out == "['data.root=/B\\xf6ses']\n", outcome.err


@pytest.mark.parametrize("more", [(), ("data.workers=0", "hardware=cpu")])
def test_resume_alone_in_a_folder_without_a_run(more, tmp_path):
    outcome = runs.train("resume=true", f"hydra.run.dir={tmp_path / 'runs' / 'mistyped'}", *more, small=False)
    assert outcome.code == 2
    assert re.fullmatch(r"error: hydra.run.dir=.*mistyped: no run to resume in this folder; [^\n]*\n", outcome.err)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def interrupted(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(arguments(run), 4)
    return run


def test_an_interrupted_run_is_not_overwritten(arguments, interrupted):
    outcome = runs.train(*arguments(interrupted), small=False)
    assert outcome.code == 2
    assert "already holds a run: add resume=true" in outcome.err


def test_changed_data_are_refused(arguments, tmp_path):
    copied = make_mvtec(tmp_path / "data", train=10).parent
    options = [x if not x.startswith("data.root=") else f"data.root={copied}" for x in arguments(tmp_path / "run")]
    interrupt(options, 4)
    make_mvtec(copied, train=11)
    outcome = runs.train(*options, "resume=true", small=False)
    assert outcome.code == 2
    expected = rf"error: data.root={copied}: not the files that .*last.ckpt was trained and tested on; train anew\n"
    assert re.fullmatch(expected, outcome.err)


def test_a_leftover_of_a_half_written_checkpoint_is_harmless(arguments, undisturbed, copied):
    part = copied / "checkpoints" / "last.part"
    part.write_bytes((copied / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    finish(arguments(copied, "resume=true"))
    assert not part.exists()
    assert_undisturbed(copied, undisturbed())


# --- by SIGKILL, in processes of their own ---


def process(arguments: list[str]) -> Any:
    started = PROCESSES.Process(target=_train, args=(arguments,))
    started.start()
    return started


def _train(arguments: list[str]) -> None:
    outcome = runs.train(*arguments, small=False)
    if outcome.code:
        print(outcome.err)
        os._exit(1)


def kill_when(started: Any, reached: Any) -> None:
    """SIGKILL as soon as `reached()`."""
    until(lambda: reached() or not started.is_alive())
    started.kill()
    started.join()
    assert started.exitcode == -9


@pytest.mark.parametrize("moment", ["started", "step 3", "half a checkpoint", "tested"])
def test_killed(arguments, undisturbed, tmp_path, moment):
    file = {"started": "checkpoints/config.json", "half a checkpoint": "checkpoints/last.part", "tested": "scores.csv"}
    for attempt in range(5):  # a checkpoint is written in a moment, which may be missed nine times
        run = tmp_path / str(attempt) / "run"
        started = process(arguments(run, "method.pause=0.05"))
        there = (run / file[moment]).exists if moment in file else partial(logged, run, int(moment.split()[1]))
        try:
            kill_when(started, there)
            break
        except AssertionError:
            if moment != "half a checkpoint" or attempt == 4:
                raise
    assert not is_finished(run)
    finish(arguments(run, "resume=true", "method.pause=0.05"))
    assert not list(run.rglob("*.part"))
    assert_undisturbed(run, undisturbed("method.pause=0.05"))


@pytest.mark.slow
def test_killed_at_random_until_it_is_done(arguments, undisturbed, tmp_path):
    """Every attempt writes a checkpoint, from which the next one continues, and is killed soon after it."""
    run, rng = tmp_path / "run", random.Random(0)

    def written() -> int:
        file = run / "checkpoints" / "last.ckpt"
        return file.stat().st_mtime_ns if file.exists() else 0

    def goes_on(started: Any, before: int) -> bool:
        return written() > before or not started.is_alive()

    for attempt in range(6):
        before = written()
        started = process(arguments(run, "method.pause=0.05", *(["resume=true"] if attempt else [])))
        until(partial(goes_on, started, before))
        started.join(rng.uniform(0, 0.2))
        started.kill()
        started.join()
        if is_finished(run):
            break
    else:
        finish(arguments(run, "method.pause=0.05", "resume=true"))
    assert json.loads((run / "result.json").read_text())["timing"]["steps"] == STEPS
    assert_undisturbed(run, undisturbed("method.pause=0.05"))
