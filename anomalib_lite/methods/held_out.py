"""The mean loss of held-out images (data.val_fraction), with which methods and runs watch training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from anomalib_lite.methods.base import AnomalyModule


@torch.no_grad()
def mean_loss(module: AnomalyModule, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> Tensor:
    """The mean, float64, of `losses(batch)` [n] over the batches of all ranks, in evaluation mode.

    Afterwards every part of the module is in the mode that it was in before, so that training goes on unchanged.
    """
    mean = MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(module.device)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for batch in batches:
        for images in module.parts(module.transfer_batch_to_device(batch, module.device, 0)):
            mean.update(losses(images).double())
    for part, training in modes.items():
        part.training = training
    return mean.compute()
