"""Runs that are interrupted inside the test's process, and the comparison of a resumed run with an undisturbed one."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_lite.methods.base import AnomalyModule


class Interrupted(Exception):  # noqa: N818
    """Stands for a kill, where no process of its own is needed."""


@contextlib.contextmanager
def interrupted_after(batches: int) -> Iterator[None]:
    """The training inside must reach this batch, counted from 1; then it stops, after the batch's checkpoint.

    0 stops the run at the beginning of testing.
    """

    def stop(module: Any, *_: Any) -> None:
        if not batches or module.trainer.callbacks[0].steps == batches:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):  # noqa: PT012
        patch.setattr(AnomalyModule, "on_train_batch_end" if batches else "on_test_start", stop, raising=False)
        yield


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a moment of another process or thread, which must come within some seconds."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.002)


def logged(run: Path, step: int) -> bool:
    """Whether metrics.csv has the row of a step; it is written with each checkpoint."""
    file = run / "metrics.csv"
    return file.is_file() and f"\n{step}," in file.read_text()


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, optimizers and schedules of two run folders to the last bit, their logs and scores to the last byte."""
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (found, expected))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0, equal_nan=True)
    for name in ("metrics.csv", "scores.csv"):
        if name == "scores.csv" or (expected / name).exists():
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
