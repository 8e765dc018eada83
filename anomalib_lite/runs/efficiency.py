"""What a method costs: parameters, FLOPs, latency and throughput, measured on a few test images."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.flop_counter import FlopCounterMode

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.methods.base import AnomalyModule


def efficiency(model: AnomalyModule, data: AnomalyDataModule, batch_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """({`parameters`, `trainable`, `flops_per_image`}, {`latency_ms` of one image, `images_per_s` at `batch_size`}).

    A multiply-add is 2 FLOPs; operations that PyTorch's counter does not know (pooling, indexing) are not counted.
    Times are measured from images in memory to scores. They are medians after a warm-up, and vary with the machine's
    load.
    """
    samples = (data.test_samples or data.train_samples)[:batch_size]
    samples = samples * (-(-batch_size // len(samples)))  # a small test set is repeated
    files = [sample.path for sample in samples[:batch_size]]
    batch = move_data_to_device(next(iter(data.new_dataloader(files, 0, batch_size, 0))), model.device)
    batch_size = len(batch["path"])  # images of different sizes are loaded one by one
    single = {key: value[:1] for key, value in batch.items() if key != "damaged"}
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:  # the counter fails on parameters that are arguments of a module, as a learned query
        parameter.requires_grad_(False)
    model.eval()  # after a test Lightning restores the mode of training
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.score(single)
        cost = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in trainable),
            "flops_per_image": counter.get_total_flops(),
        }
        latency, of_batch = (_seconds(partial(model.score, x), model.device, n) for x, n in ((single, 9), (batch, 3)))
        return cost, {"latency_ms": 1000 * latency, "images_per_s": batch_size / of_batch, "batch_size": batch_size}
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.inference_mode()
def _seconds(run: Callable[[], Any], device: torch.device, times: int) -> float:
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
