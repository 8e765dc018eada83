"""First and second moments of all training patches, for closed forms, with folds that leave images out."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch


def check_folds(folds: int) -> None:
    """Raise UserError for a number of folds that means nothing."""
    if folds < 0 or folds == 1:
        raise UserError(f"method.folds={folds}: give 0 or a number from 2")


def moments(
    method: AnomalyModule, patches: Callable[[Batch], Tensor], folds: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """E[φφᵀ] [C, C] and E[φ] [C], float64: of all training images, then of those outside each of the folds.

    Training image i is in fold i mod `folds`. Only sums are held, and every rank sees all images.

    Args:
        patches: batch -> φ [B, h, w, C]. Within a batch, products are summed in the type of φ.

    Raises:
        UserError: there are more folds than training images.
    """
    parts = range(max(1, folds))
    products: list[Tensor | int] = [0 for _ in parts]
    sums: list[Tensor | int] = [0 for _ in parts]
    counts = [0 for _ in parts]
    for batch in method.fit_batches():
        features = patches(batch)
        for part in parts:
            phi = (features[batch["index"] % folds == part] if folds else features).flatten(0, 2)
            products[part] = products[part] + (phi.T @ phi).double()
            sums[part] = sums[part] + phi.double().sum(0)
            counts[part] += len(phi)
    if not all(counts):
        raise UserError(f"method.folds={folds}: more folds than training images; give fewer, or 0")
    product, total, count = torch.as_tensor(sum(products)), torch.as_tensor(sum(sums)), sum(counts)
    yield product / count, total / count
    for part in range(folds):
        rest = count - counts[part]
        yield (product - products[part]) / rest, (total - sums[part]) / rest


def descent_time(energy: Tensor, residual: float) -> float:
    """τ = 2ηt at which Σ λ e^(−2τλ) = residual · Σ λ, by bisection on a logarithmic scale."""
    low, high = -60.0, 120.0
    for _ in range(200):
        middle = (low + high) / 2
        left = (energy * torch.exp(-2 * math.exp(middle) * energy)).sum() / energy.sum()
        low, high = (middle, high) if left > residual else (low, middle)
    return math.exp(low)
