"""PatchCore: towards total recall in industrial anomaly detection (Roth et al., CVPR 2022, arXiv 2106.08265).

A memory bank holds a coreset of the normal training images' patch features. The score of a patch is its distance to the
nearest neighbour in the bank. There is no training. Thresholds come from the scores of the training images, so a
training image is scored without its own patches in the bank.

With equal features, the coreset's picks and the neighbours equal those of the authors' code. Three things differ. Their
distances are squared. They pool each layer's patches to 1,024 numbers, where we keep all channels. Their code has no
re-weighting of the image score, which is in the paper.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anomalib_lite.data.sampler import rank_and_world
from anomalib_lite.errors import UserError, explained_memory
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.coreset import greedy_coreset, sparse_projection
from anomalib_lite.methods.nearest import Bank, nearest_in_parts
from anomalib_lite.methods.options import check_counts
from anomalib_lite.methods.patches import patch_features


class PatchCore(AnomalyModule):
    """Nearest neighbours in a coreset of patch features.

    The image score with scoring.image_score=own is the largest patch distance, re-weighted (eq. 6 and 7): with m the
    test patch, m* its neighbour and N the neighbours of m* in the bank, (1 − exp‖m − m*‖ / Σ_N exp‖m − n‖) · ‖m − m*‖.

    Args:
        coreset: share of the training patches that the bank keeps, in (0, 1].
        neighbours: b of the re-weighting, m* among them; 1 switches it off.
        max_patches: the largest number of a category's patches that the coreset is selected from, drawn at random;
            None: all. `coreset` is then a share of the drawn patches.
        project: dimensions of a sparse random projection in which the coreset is selected (the paper, section 3.2);
            None: all dimensions.
    """

    frozen_features = True
    uses_images = False
    own_image_score = True
    bank: Tensor
    owners: Tensor

    def __init__(
        self,
        coreset: float = 0.1,
        neighbours: int = 9,
        max_patches: int | None = None,
        project: int | None = None,
        **context: Any,
    ):
        super().__init__(**context)
        if not 0 < coreset <= 1:
            raise UserError(f"method.coreset={coreset}: give a share above 0, at most 1")
        check_counts(neighbours=neighbours, max_patches=max_patches, project=project)
        assert self.backbone is not None
        self.coreset, self.neighbours, self.max_patches, self.project = coreset, neighbours, max_patches, project
        # `owners`: indices of the bank's training images
        self.register_buffer("bank", torch.empty(0, sum(self.backbone.channels)))
        self.register_buffer("owners", torch.empty(0, dtype=torch.long))
        self._search: Bank | None = None

    @property
    def search(self) -> Bank:
        """What searches need of the bank, computed once for each bank and device."""
        if self._search is None or self._search.rows is not self.bank:
            self._search = Bank(self.bank, self.owners)
        return self._search

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """The first rank picks; the others get its bank."""
        rank, world = rank_and_world()
        with explained_memory(
            lambda: (
                "the training images' patches are too many for this device; limit them by method.max_patches, or give "
                "a smaller data.eval_batch_size"
            )
        ):
            bank, owners = (self.bank, self.owners) if rank else self.picked()
        if world > 1:
            count = torch.tensor(len(bank), device=self.device)
            dist.broadcast(count, 0)
            if rank:
                bank, owners = bank.new_empty(int(count), bank.shape[1]), owners.new_empty(int(count))
            dist.broadcast(bank, 0)
            dist.broadcast(owners, 0)
        self.bank, self.owners = bank, owners

    def picked(self) -> tuple[Tensor, Tensor]:
        """The coreset's patches [N, D] and the images they belong to, [N]."""
        patches, owners = self.all_patches()
        points = patches if self.project is None else sparse_projection(patches, self.project)
        count = max(1, int(self.coreset * len(patches)))
        first = int(torch.randint(len(patches), ()))
        if count == len(patches):
            return patches, owners
        picks = greedy_coreset(points, count, first)
        return patches[picks], owners[picks]

    def all_patches(self) -> tuple[Tensor, Tensor]:
        """The training images' patches [N, D] on this device, and the images they belong to, [N]; with max_patches
        those that are drawn. They are written once, into tensors of their size."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        keys, done, filled = data.fit_keys(), 0, 0
        patches, owners, drawn = torch.empty(0), torch.empty(0), None
        for batch in self.fit_batches():
            each = self.patches(batch).flatten(1, 2)
            size = each.shape[1]
            if not done:
                drawn = self.drawn([data.train_samples[i].category for _, i in keys], size)
                patches = each.new_empty(len(keys) * size if drawn is None else len(drawn), each.shape[2])
                owners = batch["index"].new_empty(len(patches))
            # the index is the same for all augmented copies of an image
            found, images = each.flatten(0, 1), batch["index"].repeat_interleave(size)
            if drawn is not None:
                rows = drawn[(drawn >= done) & (drawn < done + len(found))] - done
                found, images = found[rows], images[rows]
            patches[filled : filled + len(found)], owners[filled : filled + len(found)] = found, images
            done, filled = done + len(each) * size, filled + len(found)
        return patches, owners

    def drawn(self, categories: list[str], size: int) -> Tensor | None:
        """Positions, rising, of at most max_patches patches of every category; None if all are used.

        Args:
            categories: of the images, each of which has `size` patches.
        """
        if self.max_patches is None:
            return None
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        chosen = []
        for category in dict.fromkeys(categories):
            images = np.flatnonzero(np.array(categories, object) == category)
            count = len(images) * size
            places = np.arange(count)
            if count > self.max_patches:
                places = rng.choice(count, self.max_patches, replace=False, shuffle=False)
            chosen.append(images[places // size] * size + places % size)
        return torch.from_numpy(np.sort(np.concatenate(chosen))).to(self.device)

    def patches(self, batch: Batch) -> Tensor:
        """Patch features [B, h, w, D] (section 3.1)."""
        return patch_features(self.features(batch)).movedim(1, -1).contiguous()

    def anomaly_map(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distances of the patches to the bank, [B, h, w], and the images' re-weighted scores, [B]."""
        patches, own = self.patches(batch), batch["index"] if batch.get("is_train_image") else None
        distance, nearest = self.nearest(patches, own)
        score, at = distance.flatten(1).max(1)
        rows = torch.arange(patches.shape[0], device=at.device)
        worst, star = patches.flatten(1, 2)[rows, at], nearest[rows, at]
        if self.neighbours == 1 or len(self.bank) == 1:
            return distance, score
        count, exporting = min(self.neighbours, len(self.bank)), torch.compiler.is_exporting()
        size = self.bank.square().sum(1) if exporting else self.search.size
        # less ‖m*‖², which is the same for all rows of the bank
        squares = torch.addmm(size, self.bank[star], self.bank.T, alpha=-2)
        if own is not None and not self.search.one_owner:
            squares = squares.masked_fill(self.owners == own[:, None], torch.inf)
        squares, around = squares.topk(count, largest=False)  # [B, b]
        exponents = torch.linalg.vector_norm(worst[:, None] - self.bank[around], dim=2)
        exponents = exponents.masked_fill(squares == torch.inf, -torch.inf)
        return distance, (1 - (score - exponents.logsumexp(1)).exp()) * score

    def nearest(self, patches: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances [B, h, w] of patches [B, h, w, D] to the bank without those of the images `own` [B], and the rows
        [B, h·w] of the bank that are nearest."""
        if torch.compiler.is_exporting():  # any number of images: no loop over them
            x = patches.flatten(0, 2)
            index = nearest_in_parts(x, self.bank, self.bank.square().sum(1))
            distance = torch.linalg.vector_norm(x - self.bank[index], dim=1)
            return distance.unflatten(0, (-1, *patches.shape[1:3])), index.unflatten(
                0, (-1, patches.shape[1] * patches.shape[2])
            )
        distance, index = self.search.nearest(patches.flatten(1, 2), own)
        return distance.view(patches.shape[:3]), index
