"""Learning rates over the training budget."""

from collections.abc import Callable
from typing import Any

import torch


def with_drop(
    optimizer: torch.optim.Optimizer, drop: dict[str, float], total_steps: Callable[[], int]
) -> dict[str, Any]:
    """Return Lightning's dictionary of an optimizer whose rates drop once, after a share of the budget.

    Args:
        drop: {at: share of the budget, factor: multiplier of all learning rates from there on}.
        total_steps: gives the budget in batches. It is read after the first batch, when the budget is known.
    """

    def rate(step: int) -> float:
        return drop["factor"] if step and step >= int(drop["at"] * total_steps()) else 1.0

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
