"""What follows the results of a run: cost and figures. None of it may cost a result."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import run as run_module
from anomalib_lite.runs.efficiency import cpu_times, others
from anomalib_lite.runs.run_logger import RunLogger
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

CONFIG = """
# @package _global_
defaults:
  - override /backbone: none
method:
  _target_: MODULE.Fragile
  optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1e-2}
trainer: {max_epochs: 1}
"""


class Fragile(AnomalyModule):
    """Fails where a test says so, but only when its results are on disk."""

    score_fails: Any = None
    visualize_fails: Any = None

    def __init__(self, **context: Any):
        super().__init__(**context)
        self.net = nn.Conv2d(3, 1, 3, padding=1)

    def training_step(self, batch, batch_idx):
        return self.net(batch["image"]).square().mean()

    def anomaly_map(self, batch):
        if self.score_fails and not self.trainer.testing:
            self.score_fails(len(batch["image"]))
        return self.net(batch["image"])[:, 0].square()

    def visualize(self, batch):
        if self.visualize_fails:
            self.visualize_fails()
        return {"image": batch["image"].sigmoid()}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "method").mkdir()
    (folder / "method" / "fragile.yaml").write_text(CONFIG.replace("MODULE", __name__))
    root = make_mvtec(tmp_path_factory.mktemp("data"), train=5, good=2, defects={"broken": 2}).parent
    options = ["hardware=cpu", "logger=csv", "data.image_size=32", "data.batch_size=4", *runs.folder_data(root)]
    return [f"--config-dir={folder}", "method=fragile", *options]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    return finish(arguments, tmp_path_factory.mktemp("plain") / "run")


def finish(arguments: list[str], run: Path, *more: str) -> dict[str, Any]:
    runs.succeeded(runs.train(*arguments, *more, f"hydra.run.dir={run}", small=False))
    return json.loads((run / "result.json").read_text())


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("timing", "overrides")}


def raises(error: BaseException, batch: int = 0):
    def fail(size: Any = 0, *_: Any) -> None:
        if not batch or size == batch:
            raise error

    return fail


def test_whole_results(expected):
    assert expected["complete"] is True
    assert expected["timing"]["batch_size"] == 5  # the training images; a batch may have 32
    assert expected["timing"]["threads"] >= 1
    aupimo, thresholds = expected["notes"]  # of tiny images, and of few of them
    assert aupimo.startswith("aupimo can't be computed: ")
    assert thresholds.startswith("the thresholds come from fewer than")


@pytest.mark.parametrize(
    ("fails", "error", "missing", "note"),
    [
        (
            "score_fails",
            raises(RuntimeError("CUDA out of memory.\n Tried")),
            {"flops_per_image", "latency_ms"},
            "cost:",
        ),
        ("score_fails", raises(MemoryError(), batch=5), {"images_per_s", "batch_size"}, "cost: .*MemoryError"),
        ("visualize_fails", raises(ValueError("shown")), set(), "figures: left out or incomplete .ValueError: shown"),
        ("visualize_fails", lambda: time.sleep(30), set(), "figures: left out or incomplete .more than . s"),
    ],
)
def test_a_part_that_fails(fails, error, missing, note, arguments, expected, tmp_path, monkeypatch):
    """The run succeeds with its metrics, nulls for what is missing, and a note."""
    monkeypatch.setattr(Fragile, fails, staticmethod(error))
    monkeypatch.setattr(run_module, "EXTRA_SECONDS", 1)
    result = finish(arguments, tmp_path / "run")
    found = [each for each in result["notes"] if re.match(note, each)]
    assert len(found) == 1, result["notes"]
    values = result["timing"] | result["efficiency"]
    assert all(values[key] is None for key in missing)
    assert all(values[key] is not None for key in {"flops_per_image", "latency_ms"} - missing)
    assert result["complete"] is True
    for key in ("metrics", "thresholds", "per_defect", "data"):
        assert result[key] == expected[key]
    assert "bottle/pro" in np.load(tmp_path / "run" / "maps.npz").files


def test_cost_and_figures_are_computed_as_in_the_test(arguments, tmp_path, monkeypatch):
    """With hardware.precision=bf16 too: test and prediction leave the autocast of training."""
    found = []
    for name in ("score_fails", "visualize_fails"):
        monkeypatch.setattr(Fragile, name, staticmethod(lambda *_: found.append(torch.is_autocast_enabled("cpu"))))
    finish(arguments, tmp_path / "run", "hardware.precision=bf16")
    assert found
    assert not any(found)


def test_ended_after_the_results(arguments, expected, tmp_path, monkeypatch):
    """Ctrl-C while figures are drawn, and once more while a logger receives the results: the metrics are there, marked
    as incomplete, and so are the costs that were measured before; resumed, nothing differs.
    """
    run = tmp_path / "run"
    stops = staticmethod(raises(KeyboardInterrupt()))
    for place, name, note in (
        (Fragile, "visualize_fails", "cost and figures are missing"),
        (RunLogger, "log_test", "the loggers have not received all results"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stops)
            outcome = runs.train(*arguments, "resume=true", f"hydra.run.dir={run}", small=False)
        assert outcome.code == 130
        first = json.loads((run / "result.json").read_text())
        assert first["complete"] is False
        assert first["metrics"] == expected["metrics"]
        assert first["notes"][-1].startswith(note)
        assert (first["timing"]["latency_ms"] is None) == (place is Fragile)
    assert runs.predict(f"run={run}", f"input={run / 'none'}", f"output={run}").code == 2
    assert lasting(finish(arguments, run, "resume=true")) == lasting(expected)
    assert (run / "figures" / "bottle.png").is_file()


# --- other jobs ---


def test_other_jobs_counted_by_hand():
    own = os.getpid()
    before = {own: (1, 5.0), 7: (own, 1.0), 8: (7, 1.0), 20: (1, 3.0), 21: (1, 3.0), 22: (1, 0.0)}
    after = {own: (1, 9.0), 7: (own, 3.0), 8: (7, 3.0), 20: (1, 5.0), 21: (1, 4.5), 22: (1, 0.3), 30: (1, 9.0)}
    assert others(before, after, 2.0) == {"jobs": 2, "busy_cores": 1.8}  # 2 s and 1.5 s of CPU time in 2 s
    assert others(None, after, 2.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_busy_process_is_seen(arguments, tmp_path):
    """Also one that runs no program of ours, and whose name holds what separates the fields."""
    (tmp_path / "a) R 1 (b").symlink_to(sys.executable)
    busy = subprocess.Popen([tmp_path / "a) R 1 (b", "-c", "while True: pass"])
    try:
        while (cpu_times() or {}).get(busy.pid, (0, 0))[1] < 0.1:
            time.sleep(0.02)
        times = cpu_times()
        assert times
        other = {process: (1 if process == busy.pid else parent, used) for process, (parent, used) in times.items()}
        start = dict.fromkeys(other, (1, 0.0))  # as if its CPU time were of this moment, and it no child
        assert others(start, other, times[busy.pid][1])["jobs"] >= 1  # type: ignore[index]
    finally:
        busy.kill()
        busy.wait()
