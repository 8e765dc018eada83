"""What a method costs: parameters, FLOPs, latency and throughput, measured on a few test images."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.flop_counter import FlopCounterMode

from anomalib_lite.console import ProgressBar
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs.devices import device_name

LATENCY_RUNS, BATCH_RUNS = 9, 3  # beside one for the warm-up
WINDOW = 0.1  # seconds for which other processes are watched at least: the system counts CPU time in steps of 0.01 s


def sizes(model: AnomalyModule) -> dict[str, Any]:
    """`parameters` and `trainable`, and `flops_per_image`, which `measure_cost` fills in."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {"parameters": sum(p.numel() for p in parameters), "trainable": trainable, "flops_per_image": None}


def no_speed() -> dict[str, Any]:
    """The part of `timing` that `measure_cost` fills in."""
    return dict.fromkeys(("latency_ms", "images_per_s", "batch_size", "threads", "device", "beside"))


def measure_cost(
    model: AnomalyModule,
    data: AnomalyDataModule,
    batch_size: int,
    cost: dict[str, Any],
    speed: dict[str, Any],
    seconds: float = 30,
) -> None:
    """Set `flops_per_image` in `cost`; and in `speed` `latency_ms` of one image, `images_per_s` at `batch_size`, the
    process's `threads`, the `device`, which is the model's, and what ran `beside` it. `batch_size` is at most the
    number of images in a loader of the run.

    A multiply-add is 2 FLOPs; operations that PyTorch's counter does not know (pooling, indexing) are not counted.
    Those of PatchCore's search depend on the device and the image: on a CPU bounds leave few distances to compute.
    Times are measured from images in memory to scores. They are medians after a warm-up; the passes end after about
    `seconds`, with those that were made. Values are set one after the other: an exception leaves those measured before.
    """
    samples = data.test_samples or data.train_samples
    batch_size = min(batch_size, max(len(data.test_samples), len(data.train_samples)))  # as many as the run has seen
    samples = (samples * (-(-batch_size // len(samples))))[:batch_size]
    batch = next(iter(data.new_dataloader([sample.path for sample in samples], 0, batch_size, 0)))
    batch = move_data_to_device(batch, model.device)
    single = {key: value[:1] for key, value in batch.items() if key != "damaged"}
    one, many = (partial(model.predict_step, images, 0) for images in (single, batch))
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:  # the counter fails on parameters that are arguments of a module, as a learned query
        parameter.requires_grad_(False)
    model.eval()  # after a test Lightning restores the mode of training
    try:
        with ProgressBar("measuring cost", LATENCY_RUNS + BATCH_RUNS + 3) as bar:
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                one()
            cost["flops_per_image"], speed["device"] = counter.get_total_flops(), device_name(model.device)
            bar.step()
            start, before = time.monotonic(), cpu_times()
            half = seconds / 2
            speed["latency_ms"] = 1000 * _seconds(one, model.device, LATENCY_RUNS, half, bar)
            taken = _seconds(many, model.device, BATCH_RUNS, half, bar)
            number = len(batch["path"])  # images of different sizes are loaded one by one
            speed |= {"images_per_s": number / taken, "batch_size": number, "threads": torch.get_num_threads()}
            time.sleep(max(0.0, start + WINDOW - time.monotonic()))
            speed["beside"] = others(before, cpu_times(), time.monotonic() - start)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.inference_mode()
def _seconds(run: Callable[[], Any], device: torch.device, times: int, limit: float, bar: ProgressBar) -> float:
    """The median duration of some passes after a warm-up; of fewer after `limit` seconds."""
    taken: list[float] = []
    while len(taken) <= times and sum(taken) < limit:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        bar.step()
    return statistics.median(taken[1:] or taken)


def cpu_times() -> dict[int, tuple[int, float]] | None:
    """{process: (its parent, seconds of CPU time that it has used)}; None where the system does not tell (/proc)."""
    found, tick = {}, os.sysconf("SC_CLK_TCK")
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()  # the name before may hold anything
        except OSError:  # it has ended
            continue
        found[int(file.parent.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / tick
    return found or None


def others(before: Any, after: Any, seconds: float) -> dict[str, Any] | None:
    """Number of other processes (`jobs`) that used a fifth of a core or more, and how many cores they kept busy.

    Latency beside other jobs says little: a table of costs marks it. The processes that this one has started count as
    its own.
    """
    if before is None or after is None:
        return None
    own = {os.getpid()}
    while more := {process for process, (parent, _) in after.items() if parent in own} - own:
        own |= more
    used = [(after[process][1] - before[process][1]) / seconds for process in after.keys() & before.keys() - own]
    busy = [share for share in used if share >= 0.2]
    return {"jobs": len(busy), "busy_cores": round(sum(busy), 1)}
