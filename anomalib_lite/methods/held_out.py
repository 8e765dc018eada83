"""The mean loss of held-out images (data.val_fraction), with which methods and runs watch training."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor


@torch.no_grad()
def mean_loss(module: L.LightningModule, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> Tensor:
    """The mean, float64, of `losses(batch)` [n] over the batches of all ranks, in evaluation mode.

    Afterwards every part of the module is in the mode that it was in before, so that training goes on unchanged.
    """
    total = torch.zeros(2, dtype=torch.float64, device=module.device)  # sum and number
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for batch in batches:
        each = losses(module.transfer_batch_to_device(batch, module.device, 0)).double()
        total += torch.stack([each.sum(), torch.tensor(len(each), dtype=torch.float64, device=each.device)])
    for part, training in modes.items():
        part.training = training
    total = module.trainer.strategy.reduce(total, reduce_op="sum")
    return total[0] / total[1]
