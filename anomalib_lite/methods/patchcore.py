"""PatchCore: towards total recall in industrial anomaly detection (Roth et al., CVPR 2022, arXiv 2106.08265).

A memory bank holds a coreset of the normal training images' patch features. The score of a patch is its distance to the
nearest neighbour in the bank. There is no training. Thresholds come from the scores of the training images, so a
training image is scored without its own patches in the bank.

With equal features, the coreset's picks and the neighbours equal those of the authors' code. Three things differ. Their
distances are squared. They pool each layer's patches to 1,024 numbers, where we keep all channels. Their code has no
re-weighting of the image score, which is in the paper.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.coreset import greedy_coreset
from anomalib_lite.methods.fitted_buffers import register_fitted
from anomalib_lite.methods.patches import patch_features


class PatchCore(AnomalyModule):
    """Nearest neighbours in a coreset of patch features.

    The image score with scoring.image_score=own is the largest patch distance, re-weighted (eq. 6 and 7): with m the
    test patch, m* its neighbour and N the neighbours of m* in the bank, (1 − exp‖m − m*‖ / Σ_N exp‖m − n‖) · ‖m − m*‖.

    Args:
        coreset: share of the training patches that the bank keeps, in (0, 1].
        neighbours: b of the re-weighting, m* among them; 1 switches it off.
    """

    frozen_features = True
    uses_images = False
    own_image_score = True
    bank: Tensor
    owners: Tensor

    def __init__(self, coreset: float = 0.1, neighbours: int = 9, **context: Any):
        super().__init__(**context)
        if not 0 < coreset <= 1 or neighbours < 1:
            raise UserError(
                f"method.coreset={coreset}, method.neighbours={neighbours}: a share above 0 and at most 1, and a whole "
                "number from 1"
            )
        assert self.backbone is not None
        self.coreset, self.neighbours = coreset, neighbours
        # `owners`: indices of the bank's training images
        bank = torch.empty(0, sum(self.backbone.channels))
        register_fitted(self, bank=bank, owners=torch.empty(0, dtype=torch.long))

    @torch.no_grad()
    def on_fit_start(self) -> None:
        each, images = [], []
        for batch in self.fit_batches():
            each.append(self.patches(batch).flatten(1, 2).cpu())
            images.append(batch["index"].cpu())  # the same for all augmented copies of an image
        owners = torch.cat(images).repeat_interleave(each[0].shape[1])
        patches = torch.cat(each).flatten(0, 1)
        del each
        count = max(1, int(self.coreset * len(patches)))
        first = int(torch.randint(len(patches), ()))
        picks = greedy_coreset(patches, count, first) if count < len(patches) else torch.arange(count)
        self.bank = patches[picks].to(self.device)
        self.owners = owners[picks].to(self.device)

    def patches(self, batch: Batch) -> Tensor:
        """Patch features [B, h, w, D] (section 3.1)."""
        return patch_features(self.features(batch)).movedim(1, -1).contiguous()

    def anomaly_map(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distances of the patches to the bank, [B, h, w], and the images' re-weighted scores, [B]."""
        patches = self.patches(batch)
        distance, nearest = self.nearest(patches, batch["index"] if batch.get("is_train_image") else None)
        score, at = distance.flatten(1).max(1)
        rows = torch.arange(patches.shape[0], device=at.device)
        worst, star = patches.flatten(1, 2)[rows, at], nearest[rows, at]
        if self.neighbours == 1 or len(self.bank) == 1:
            return distance, score
        count = min(self.neighbours, len(self.bank))
        around = distances(self.bank[star], self.bank).topk(count, largest=False).indices  # [B, b], m* among them
        exponents = distances(worst[:, None], self.bank[around])[:, 0]
        return distance, (1 - (score - exponents.logsumexp(1)).exp()) * score

    def nearest(self, patches: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances [B, h, w] of patches [B, h, w, D] to the bank without those of the images `own` [B], and the rows
        [B, h·w] of the bank that are nearest."""
        if torch.compiler.is_exporting():  # any number of images: no loop over them
            distance, index = nearest_in_parts(patches.flatten(0, 2), self.bank)
            return distance.unflatten(0, (-1, *patches.shape[1:3])), index.unflatten(
                0, (-1, patches.shape[1] * patches.shape[2])
            )
        own = torch.full((len(patches),), -1, device=patches.device) if own is None else own
        found = [neighbours(x.flatten(0, 1), self.bank, self.owners == i) for x, i in zip(patches, own, strict=True)]
        distance = torch.stack([distance for distance, _ in found]).view(patches.shape[:3])
        return distance, torch.stack([index for _, index in found])


def neighbours(x: Tensor, bank: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance [M] of each row of x [M, D] to the nearest row of the bank [N, D], and that row's index [M].

    Rows where `without` [N] is true are left out, unless no row would remain.
    """
    size = bank.square().sum(1)
    if without is not None and not without.all():
        size = size.masked_fill(without, torch.inf)
    # ‖x‖² is the same for all rows of the bank
    nearest = torch.cat([torch.addmm(size, part, bank.T, alpha=-2).argmin(1) for part in x.split(1024)])
    return torch.linalg.vector_norm(x - bank[nearest], dim=1), nearest


def nearest_in_parts(x: Tensor, bank: Tensor, part: int = 4096) -> tuple[Tensor, Tensor]:
    """`neighbours` for an exported graph: parts of the bank, whose size is known, instead of parts of x."""
    best, index = x.new_full(x.shape[:1], torch.inf), torch.zeros(x.shape[:1], dtype=torch.long)
    for start in range(0, len(bank), part):
        rows = bank[start : start + part]
        least = torch.addmm(rows.square().sum(1), x, rows.T, alpha=-2).min(1)
        index = torch.where(least.values < best, least.indices + start, index)
        best = torch.minimum(best, least.values)
    return torch.linalg.vector_norm(x - bank[index], dim=1), index


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [..., M, N] of rows [..., M, D] and [..., N, D]."""
    if not torch.compiler.is_exporting():
        return torch.cdist(x, y)
    if y.dim() > 2:
        return torch.linalg.vector_norm(x - y, dim=-1)[..., None, :]  # M = 1
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * x @ y.mT
    return squares.clamp_min(0).sqrt()
