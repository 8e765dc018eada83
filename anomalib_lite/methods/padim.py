"""PaDiM: a patch distribution modeling framework (Defard et al., ICPR workshops 2021, arXiv 2011.08785).

Every position of the image has a Gaussian of its own over a random subset of the channels of all levels. The score is
the Mahalanobis distance to it. There is no training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_lite.errors import UserError, explained_memory
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.tiles import position_note
from anomalib_lite.methods.transformer import token_grids

CHUNK = 256  # positions whose covariances are inverted together


class PaDiM(AnomalyModule):
    """√((x − μ)ᵀ Σ⁻¹ (x − μ)) with Σ = S / (N − 1) + λI (equations 1 and 2), S the scatter of N training images.

    A training image is scored by the Gaussian of the others, as far as it is fitted and scored in the same form: with
    augmentations it is not.

    Args:
        dim: size of the subset of channels, drawn with the run's seed.
        regularisation: λ, above 0.
    """

    frozen_features = True
    uses_images = False
    subset: Tensor
    mean: Tensor
    whitening: Tensor
    fitted: Tensor

    def __init__(self, dim: int = 100, regularisation: float = 0.01, **context: Any):
        super().__init__(**context)
        assert self.backbone is not None
        channels = sum(self.backbone.channels)
        if not 1 <= dim <= channels:
            raise UserError(f"method.dim={dim}: the levels have {channels} channels together; give 1 to {channels}")
        if regularisation <= 0:
            raise UserError(f"method.regularisation={regularisation}: give a number above 0, such as 0.01")
        self.regularisation, self.grid = regularisation, token_grids(self)[0]
        positions = self.grid[0] * self.grid[1]
        self.register_buffer("subset", torch.randperm(channels)[:dim])
        self.register_buffer("mean", torch.zeros(positions, 1, dim))
        self.register_buffer("whitening", torch.zeros(positions, dim, dim))  # W with WᵀW = Σ⁻¹
        self.register_buffer("fitted", torch.zeros((), dtype=torch.long))  # N; 0 if training images are fitted changed

    def embedding(self, batch: Batch) -> Tensor:
        """The subset of the channels of all levels at the first level's grid, [h·w, B, dim]."""
        levels = [F.interpolate(level, self.grid, mode="nearest") for level in self.features(batch)]
        return torch.cat(levels, 1)[:, self.subset].flatten(2).permute(2, 0, 1)

    def notes(self) -> list[str]:
        return position_note(self.tiling)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        with explained_memory(
            lambda: f"a Gaussian of method.dim={len(self.subset)} numbers at every position; give a smaller method.dim"
        ):
            scatter, count = torch.zeros_like(self.whitening, dtype=torch.float64), 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        for batch in self.fit_batches():
            x = self.embedding(batch).double()
            scatter.baddbmm_(x.mT, x)
            total, count = total + x.sum(1, keepdim=True), count + x.shape[1]
        mean, ones = total / count, torch.eye(scatter.shape[-1], dtype=torch.float64, device=scatter.device)
        for at in range(0, len(scatter), CHUNK):
            part, centre = scatter[at : at + CHUNK], mean[at : at + CHUNK]
            covariance = (part - count * centre.mT @ centre) / max(1, count - 1) + self.regularisation * ones
            factor = torch.linalg.cholesky(covariance)
            self.whitening[at : at + CHUNK] = torch.linalg.solve_triangular(factor, ones, upper=False)
        self.mean.copy_(mean)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.fitted.fill_(count if data.corrupt is None and data.train_pipeline is data.eval_pipeline else 0)

    def anomaly_map(self, batch: Batch) -> Tensor:
        x = self.embedding(batch) - self.mean
        squares = torch.bmm(x, self.whitening.mT).square().sum(-1)  # [h·w, B]
        if batch.get("is_train_image"):
            squares = torch.where(self.fitted > 0, without_itself(squares, self.fitted), squares)
        return squares.sqrt().T.unflatten(1, self.grid)


def without_itself(squares: Tensor, count: Tensor) -> Tensor:
    """Squared distances of N training images, each to the Gaussian of the N − 1 others, from those to that of all.

    With K = S + λ(N − 1)I and v = x − μ, the others have v' = N / (N − 1) v and, divided by N − 2, the covariance
    K − N / (N − 1) vvᵀ, whose λ is larger by (N − 1) / (N − 2). The formula of Sherman and Morrison inverts it.
    """
    others = (count - 1).clamp_min(1)
    share, q = count / others, squares / others  # q = vᵀK⁻¹v < 1 / share
    return share**2 * (count - 2).clamp_min(1) * q / (1 - share * q).clamp_min(1e-5)
