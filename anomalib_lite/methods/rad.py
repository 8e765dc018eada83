"""RAD: retrieval-based anomaly detection (Zhang et al., ICML 2026, arXiv 2601.22763).

Similar training images are retrieved, then their patches at about the same position. There is no training: a bank holds
class and patch tokens of all training images, in bf16. One bank serves several classes without labels. The authors
choose k and r for every data set on test results; here they are fixed.

Our reading: a backbone without a class token is represented by the mean over positions of its last level. Levels of
other grids are compared on their own grids, and their maps are resized to the first one's.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.options import check_counts, check_from_0
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.tiles import position_note
from anomalib_lite.methods.transformer import token_grids

log = logging.getLogger(__name__)
LIMITS = (2**24, 2**30)  # bytes of what is compared at once on a CPU, which likes its cache, and on a GPU


class RAD(AnomalyModule):
    """For every layer and position 1 − max cos to the patches of the k nearest images, averaged over layers.

    The nearest images are those whose class token in the last layer has the largest cosine. Their patches are at most
    r positions away, in rows and in columns. A training image is scored without itself.

    Args:
        k: number of images. r: radius in positions.
    """

    frozen_features = True
    uses_images = False
    uses_tokens = True
    descriptors: Tensor
    owners: Tensor

    def __init__(self, k: int = 150, r: int = 1, **context: Any):
        super().__init__(**context)
        check_counts(k=k)
        check_from_0(r=r)
        self.k, self.r, self.levels = k, r, len(token_grids(self))
        # descriptors [N, C] and indices [N] of N training images (of data.copies or of tiles), and for each level patch
        # tokens [H_i·W_i, N, C_i]; descriptors and tokens have the norm 1
        self.register_buffer("descriptors", torch.empty(0))
        self.register_buffer("owners", torch.empty(0, dtype=torch.long))
        for i in range(self.levels):
            self.register_buffer(f"bank{i}", torch.empty(0, dtype=torch.bfloat16))

    @property
    def banks(self) -> list[Tensor]:
        return [getattr(self, f"bank{i}") for i in range(self.levels)]

    def notes(self) -> list[str]:
        size = sum(bank.nbytes for bank in self.banks) / 2**30
        what = "tiles" if self.tiling else "images"
        return [f"the bank of {len(self.descriptors)} training {what} takes {size:.3f} GB", *position_note(self.tiling)]

    def patches(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Patch tokens of every level, [B, H_i, W_i, C_i], and descriptors [B, C] of the images; all of norm 1."""
        levels, tokens = self.features_and_tokens(batch)
        has_class = tokens and self.backbone.class_token  # type: ignore[union-attr]
        descriptor = tokens[-1][:, 0] if has_class else levels[-1].mean((2, 3))
        return [F.normalize(x.movedim(1, -1), dim=-1) for x in levels], F.normalize(descriptor, dim=-1)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        count, done, descriptors, owners = len(data.fit_keys()), 0, list[Tensor](), list[Tensor]()
        for batch in self.fit_batches():
            levels, descriptor = self.patches(batch)
            if not done:
                check_memory(count * sum(2 * level[0].numel() for level in levels), count, self.device)
                for i, level in enumerate(levels):
                    shape = level[0, ..., 0].numel(), count, level.shape[-1]
                    setattr(self, f"bank{i}", level.new_empty(shape, dtype=torch.bfloat16))
            for bank, level in zip(self.banks, levels, strict=True):
                bank[:, done : done + len(level)] = level.flatten(1, 2).transpose(0, 1)
            descriptors.append(descriptor)
            owners.append(batch["index"])
            done += len(descriptor)
        self.descriptors, self.owners = torch.cat(descriptors), torch.cat(owners)
        log.info(self.notes()[0])

    def retrieved(self, descriptor: Tensor, without: Tensor | None) -> Tensor:
        """Whether an image [N] is one of the k nearest of a batch's images, bool [B, N].

        Copies of image without[i] are not, unless no other image would remain.
        """
        similar = descriptor @ self.descriptors.T
        if without is not None:
            own = self.owners == without[:, None]
            similar = similar.masked_fill(own & ~own.all(1, keepdim=True), -torch.inf)
        nearest = similar.topk(min(self.k, similar.shape[1])).indices
        return torch.zeros_like(similar, dtype=torch.bool).scatter(1, nearest, True) & (similar > -torch.inf)

    def anomaly_map(self, batch: Batch) -> Tensor:
        levels, descriptor = self.patches(batch)
        chosen = self.retrieved(descriptor, batch["index"] if batch.get("is_train_image") else None)
        images = torch.arange(chosen.shape[1], device=chosen.device)
        if len(images) > self.k and not torch.compiler.is_exporting():  # near no image of the batch: not compared
            images = images[chosen.any(0)]
        near = chosen[:, images]
        maps = [1 - largest_cosines(x, bank, images, near, self.r) for x, bank in zip(levels, self.banks, strict=True)]
        size = maps[0].shape[1:]
        return torch.stack([resize(x[:, None], size)[:, 0] for x in maps]).mean(0)


def largest_cosines(x: Tensor, bank: Tensor, images: Tensor, near: Tensor, r: int) -> Tensor:
    """The largest cosine of each patch with those of near images that are at most r rows and columns away, [B, h, w].

    Every patch of the bank is multiplied with the (2r + 1)² patches around its position of all images of the batch, for
    some rows of positions at once.

    Args:
        x: patches [B, h, w, C] of norm 1. bank: patches [h·w, N, C] of N images. images: indices [n] into the bank.
        near: bool [B, n], which of these images each one is compared with.
    """
    (count, h, w, channels), side = x.shape, 2 * r + 1
    padded = F.pad(x, (0, 0, r, r, r, r))
    bias = torch.zeros_like(near, dtype=x.dtype).masked_fill(~near, -torch.inf).T.repeat_interleave(side**2, 1)
    best = list[Tensor]()
    rows = h  # in an exported graph: the number of images is not known
    if not torch.compiler.is_exporting():
        rows = max(1, LIMITS[x.is_cuda] // (4 * w * (len(images) + count * side**2) * channels))
    for top in range(0, h, rows):
        block, bottom = slice(top * w, (top + rows) * w), min(h, top + rows)
        around = padded[:, top : bottom + 2 * r].unfold(1, side, 1).unfold(2, side, 1)  # [B, rows, w, C, side, side]
        around = around.permute(1, 2, 0, 4, 5, 3).reshape((bottom - top) * w, -1, channels)
        stored = bank[block] if len(images) == bank.shape[1] else bank[block].index_select(1, images)
        best.append(torch.bmm(stored.to(x.dtype), around.mT).add_(bias).amax(1))
    # best[p, b, (i, j)]: of the bank's patches at p and the image's at p + (i − r, j − r)
    planes = F.pad(torch.cat(best).view(h, w, count, side, side).permute(2, 3, 4, 0, 1), (r, r, r, r), value=-torch.inf)
    moved = [planes[:, i, j, 2 * r - i :, 2 * r - j :][:, :h, :w] for i in range(side) for j in range(side)]
    return torch.stack(moved).amax(0)


def check_memory(needed: int, images: int, device: torch.device) -> None:
    """Raise UserError unless so many bytes are free on the device."""
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"method=rad: the bank of {images} training images needs {needed / 2**30:.1f} GB and {free / 2**30:.1f} GB "
            "are free; give a smaller data.image_size, fewer backbone.layers, or fewer training images"
        )


def free_memory(device: torch.device) -> float:
    """Free memory of a device in bytes, infinite where the system does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, and unused
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
