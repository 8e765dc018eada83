"""Learning rates over the training budget."""

import math
from collections.abc import Callable
from typing import Any

import torch


def after_every_batch(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Lightning's dictionary of an optimizer and its scheduler, which is stepped after every batch."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def per_step(optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> dict[str, Any]:
    """Lightning's dictionary of an optimizer whose learning rates are multiplied by `rate(step)`, from step 0 on."""
    return after_every_batch(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))


def with_drop(optimizer: torch.optim.Optimizer, drop: dict[str, float], total_steps: int) -> dict[str, Any]:
    """Lightning's dictionary of an optimizer whose rates drop once, after a share of the budget of `total_steps`.

    `drop` is {at: share of the budget, factor: multiplier of all learning rates from there on}.
    """
    first = max(1, int(drop["at"] * total_steps))
    return per_step(optimizer, lambda step: drop["factor"] if step >= first else 1.0)


def warm_up_then_cosine(step: int, total: int, warm_up: int, final: float) -> float:
    """Dinomaly's factor of the learning rate: linspace(0, 1, warm_up), then half a cosine from 1 down to `final`.

    f + ½(1 − f)(1 + cos π(i − w)/(T − w)) at step i ≥ w of T, with f = final and w = warm_up. A final of 1 keeps 1.
    """
    if step < warm_up:
        return step / max(1, warm_up - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up))) / 2
