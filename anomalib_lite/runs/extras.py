"""What a run adds to its results once they are on disk: its cost, figures, and the reports of its loggers.

Nothing here may cost a result: each part has a limit of time, and one that fails becomes a note.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import artifacts, folder, summary
from anomalib_lite.runs.devices import peak_memory_mb
from anomalib_lite.runs.efficiency import measure_cost
from anomalib_lite.runs.figures import training_figure, write_figures
from anomalib_lite.runs.run_logger import RunLogger
from anomalib_lite.runs.test_outputs import TEST

log = logging.getLogger(__name__)
PENDING = "cost and figures are missing: the run ended before they were made; resume=true makes them"
UNREPORTED = (
    "the loggers have not received all results: the run ended before; resume=true repeats the test and logs them"
)


def write_with_extras(
    run: Path,
    result: dict[str, Any],
    data: AnomalyDataModule,
    outputs: dict[int, dict[str, Any]],
    curves: dict[str, np.ndarray],
    model: AnomalyModule,
    device: torch.device,
    batch_size: int | None,
    loggers: Sequence[Logger],
    seconds: float,
) -> None:
    """Write scores, maps and result.json, then add the rest and complete result.json, which says `complete: true`.

    Args:
        curves: the points of the test images' curves.
        device: of the run, on which the cost is measured and figures are made.
        batch_size: at which the cost is measured; None: the cost is not measured, and its values are null.
        seconds: limit of each part.
    """
    notes, test = result["notes"], outputs[TEST]
    artifacts.write_scores(run, test)
    artifacts.write_maps(run, test, curves, summary.normal_columns(outputs))
    artifacts.write_result(run, result | {"complete": False, "notes": [*notes, PENDING]})
    log.info("the results are written; cost and figures follow")
    with attempt("the model on the run's device", seconds, notes):
        model.to(device)  # Lightning moves it to the CPU after every fit and test
    if batch_size:
        with attempt("cost", seconds, notes):
            measure_cost(model, data, batch_size, result["efficiency"], result["timing"])
    with attempt("figures", seconds, notes):
        title = f"{result['method']}, seed {result['seed']}"
        write_figures(run / folder.FIGURES, data, test, result["thresholds"]["per_category"], title, model)
    with attempt("figures of training images", seconds, notes):
        training_figure(run / folder.FIGURES, data, model)
    result["timing"]["peak_memory_mb"] = peak_memory_mb()
    artifacts.write_result(run, result | {"complete": False, "notes": [*notes, UNREPORTED]})
    for logger in loggers:
        if isinstance(logger, RunLogger):
            with attempt(f"logger {type(logger).__name__}", seconds, notes):
                logger.log_test(result, data, test, curves)
    artifacts.write_result(run, result | {"complete": True})  # last: a run that ends before its loggers can be resumed


@contextlib.contextmanager
def attempt(what: str, seconds: float, notes: list[str]) -> Iterator[None]:
    """Run the block; an exception, or a block that takes longer, becomes a note and a line of the log."""
    try:
        with time_limit(seconds):
            yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = f"more than {seconds:.0f} s" if isinstance(error, TooLongError) else reason[:300]
        notes.append(f"{what}: left out or incomplete ({reason})")
        log.warning("%s", notes[-1])
        log.debug("%s", what, exc_info=error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TooLongError(Exception):
    """Raised by `time_limit`."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block after these seconds; a call into a library ends first. Main thread only."""

    def stop(*_: Any) -> None:
        raise TooLongError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again every 5 s, should the block have caught the first one
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
