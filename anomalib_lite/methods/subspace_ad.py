"""SubspaceAD: training-free few-shot anomaly detection via subspace modeling (Lendering et al., CVPR 2026, arXiv
2602.23013).

What the principal components of normal patches do not explain of a patch is its score. A transformer's blocks, which
have one shape, are averaged, as published. A CNN's levels are pooled, resized and concatenated, as for
norm_occ_closed_form (our choice): so this method is the control of that one, which weights all components softly
instead of dropping some.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.moments import check_folds, moments
from anomalib_lite.methods.patches import patch_features


class SubspaceAD(AnomalyModule):
    """‖x − μ − CCᵀ(x − μ)‖², with μ the mean patch and C the r first principal components of the training patches.

    Args:
        variance: share v of the variance; r is the fewest components whose cumulative share reaches v, 0 < v < 1.
        folds: 0, or a number from 2: the training images are divided into so many parts, and each part is scored by
            components of the others. So thresholds do not come from images that the components were fitted to.
    """

    frozen_features = True
    uses_images = False
    mean: Tensor
    minor: Tensor

    def __init__(self, variance: float = 0.99, folds: int = 0, **context: Any):
        super().__init__(**context)
        if not 0 < variance < 1:
            raise UserError(f"method.variance={variance}: give a share above 0 and below 1, such as 0.99")
        check_folds(folds)
        assert self.backbone is not None
        shapes = set(zip(self.backbone.channels, self.backbone.reductions, strict=True))
        self.keeps = "mean" if len(shapes) == 1 else ""
        self.variance, self.folds = variance, folds
        # μ [1 + folds, C] and the components that are not in C, as columns beside zeros, [1 + folds, C, C]
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("minor", torch.empty(0))

    def kept(self, levels: list[Tensor]) -> list[Tensor]:
        """The mean of levels of one shape."""
        return [torch.stack(levels).mean(0)] if self.keeps else levels

    def patches(self, batch: Batch) -> Tensor:
        """x of every position, [B, h, w, C]."""
        levels = self.features(batch)
        return (levels[0] if self.keeps else patch_features(levels)).movedim(1, -1)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        fits = list(moments(self, lambda batch: self.patches(batch).double(), self.folds))
        self.mean = torch.stack([mean for _, mean in fits]).float()
        self.minor = torch.stack(
            [minor_axes(moment - mean.outer(mean), self.variance) for moment, mean in fits]
        ).float()

    def anomaly_map(self, batch: Batch) -> Tensor:
        x = self.patches(batch)
        mean, minor = self.mean[0], self.minor[0]
        if self.folds and batch.get("is_train_image"):
            fold = 1 + batch["index"] % self.folds
            mean, minor = self.mean[fold][:, None], self.minor[fold]
        # CCᵀ and the minor components add up to the identity: the residual is computed without a difference
        return ((x.flatten(1, 2) - mean) @ minor).square().sum(-1).unflatten(1, x.shape[1:3])


def minor_axes(covariance: Tensor, variance: float) -> Tensor:
    """Eigenvectors of a covariance [C, C] without the fewest that explain this share of the variance.

    They are columns of [C, C], in which the explaining ones are zero.
    """
    energy, axes = torch.linalg.eigh(covariance)
    energy = energy.clamp_min(0).flip(0)
    # the variance that larger components explain; a GPU has no deterministic cumulative sum
    before = energy.cpu().cumsum(0).to(energy) - energy
    return axes * (before.flip(0) >= variance * energy.sum())
