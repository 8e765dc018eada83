"""What Dinomaly and INP-Former share: fused groups of a frozen transformer's blocks, and their reconstruction.

The levels of the backbone are cut into groups, and each group is averaged. These fused maps are all that training and
test need of the backbone, because the bottleneck's input, the mean of all levels, is also the mean of the fused maps.
The outputs of the decoder's blocks, the last one first, are cut into as many groups and averaged. Group by group they
are compared with the encoder's by their cosine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.options import check_clip, check_counts, check_from_0
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.schedules import after_every_batch, per_step, warm_up_then_cosine
from anomalib_lite.methods.transformer import feed_forward


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01²), cut at ±0.03, and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.03, b=0.03)
    nn.init.zeros_(layer.bias)
    return layer


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-8)


def mlp(dim: int) -> nn.Sequential:
    """The feed-forward network of a transformer's block, four times as wide inside, with GELU."""
    return feed_forward(dim, 4 * dim, nn.GELU(), layer=linear)


def by_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class GroupedReconstruction(AnomalyModule):
    """Fused maps, their reconstruction, the loss over groups, the anomaly map and the optimisation.

    A subclass defines `reconstructed` and `gradient_scale`, and may change `targets` and `parameter_groups`.

    Args:
        groups: number of groups that levels and decoder blocks are cut into. With 1, levels of different shapes (of a
            CNN) are resized to the coarsest grid by averaging and concatenated; this is ours, the papers have ViTs.
        blocks: number of the decoder's blocks. heads: of its attention; None: one per 64 channels, as in the encoders.
        clip: largest norm of a step's gradient; None is no limit.
        warm_up: steps over which the learning rate rises from 0. final: its last value as a share of the largest.
    """

    frozen_features = True
    uses_images = False

    def __init__(
        self,
        groups: int = 2,
        blocks: int = 8,
        heads: int | None = None,
        clip: float | None = 0.1,
        warm_up: int = 100,
        final: float = 0.1,
        **context: Any,
    ):
        super().__init__(**context)
        assert self.backbone is not None
        check_clip(clip)
        check_from_0(warm_up=warm_up)
        check_counts(blocks=blocks, heads=heads)
        if not 0 <= final <= 1:
            raise UserError(f"method: final={final}: give a share from 0 to 1")
        self.joins = check_groups(self.backbone, groups, blocks)
        self.groups, self.blocks, self.clip, self.warm_up, self.final = groups, blocks, clip, warm_up, final
        self.keeps = "joined" if self.joins else f"means of {groups} groups"
        self.dim = sum(self.backbone.channels) if self.joins else self.backbone.channels[0]
        self.heads = heads or max(n for n in range(1, max(1, self.dim // 64) + 1) if self.dim % n == 0)
        if self.heads < 1 or self.dim % self.heads:
            raise UserError(f"method.heads={heads}: the {self.dim} channels are not divisible by it; give null")

    def reconstructed(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | float]:
        """Tokens [B, T + N, D] -> the outputs of all decoder blocks in order, of the same shape, and a further loss."""
        raise NotImplementedError

    def gradient_scale(self, distances: Tensor) -> Tensor | None:
        """Factors [B, N] of the gradient at every position, from its distance [B, N]; None leaves the gradient."""
        return None

    def targets(self, patches: list[Tensor], prefixes: list[Tensor]) -> list[Tensor]:
        """For each group what is to be reconstructed, [B, N, D], from its patches [B, N, D] and tokens [B, T, D]."""
        return patches

    def kept(self, levels: list[Tensor]) -> list[Tensor]:
        """The mean of each group's maps, then the mean of each group's token maps."""
        assert self.backbone is not None
        count = len(self.backbone.channels)
        if self.joins:
            size = min((level.shape[-2], level.shape[-1]) for level in levels)
            return [torch.cat([F.adaptive_avg_pool2d(level, size) for level in levels], 1)]
        return [*means(levels[:count], self.groups), *means(levels[count:], self.groups)]

    def pairs(self, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, int], Tensor | float]:
        """(target, reconstruction) [B, N, D] of every group, the grid (H, W) with H·W = N, and a further loss."""
        maps, prefixes = self.features_and_tokens(batch)
        patches = [level.flatten(2).mT for level in maps]
        whole = [torch.cat(both, 1) for both in zip(prefixes, patches, strict=True)] if prefixes else patches
        with self.autocast():
            outputs, further = self.reconstructed(means(whole, 1)[0])
        first = prefixes[0].shape[1] if prefixes else 0
        found = [x[:, first:] for x in means(outputs[::-1], self.groups)]
        grid = maps[0].shape[-2], maps[0].shape[-1]
        return list(zip(self.targets(patches, prefixes), found, strict=True)), grid, further

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean over groups and images of 1 − cos of the flattened maps, with rescaled gradients."""
        pairs, _, loss = self.pairs(batch)
        for target, found in pairs:
            scale = self.gradient_scale(distance(target, found.detach()))
            if scale is not None and found.requires_grad:
                found.register_hook(lambda gradient, scale=scale[..., None]: gradient * scale)
            loss = loss + cosine_loss(target, found).mean() / len(pairs)
        return loss  # type: ignore[return-value]

    def held_out_loss(self, batch: Batch) -> Tensor:
        return means([cosine_loss(*pair) for pair in self.pairs(batch)[0]], 1)[0]

    def anomaly_map(self, batch: Batch) -> Tensor:
        """Mean over groups of 1 − cos over channels, at the input's size (bilinear, corners aligned)."""
        assert self.backbone is not None
        pairs, grid, _ = self.pairs(batch)
        maps = means([distance(*pair) for pair in pairs], 1)[0].unflatten(1, grid)
        size = [side * max(self.backbone.reductions) for side in grid]
        return resize(maps[:, None], size, align_corners=True)[:, 0]

    def without_effect(self) -> dict[str, str]:
        return {} if self.scheduler is None else dict.fromkeys(("warm_up", "final"), "method.scheduler")

    # --- optimisation ---

    def parameter_groups(self) -> list[Any]:
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        if optimizer is None:
            return None
        if self.scheduler is not None:
            return after_every_batch(optimizer, self.scheduler(optimizer))
        return per_step(optimizer, lambda i: warm_up_then_cosine(i, self.total_steps, self.warm_up, self.final))


def check_groups(backbone: Backbone, groups: int, blocks: int) -> bool:
    """Whether the levels have different shapes and are joined. Raises UserError if groups can't be formed."""
    count = len(backbone.channels)
    if groups < 1 or blocks < 1 or count % groups or blocks % groups:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"method.groups={groups}: {count} levels (backbone.layers) and {blocks} decoder blocks (method.blocks) are "
            f"not divisible by it; give {' or '.join(map(str, fitting))}, and a multiple of it for method.blocks"
        )
    differ = len(set(zip(backbone.channels, backbone.reductions, strict=True))) > 1
    if differ and groups > 1:
        raise UserError(
            f"method.groups={groups}: the levels of {backbone.name} have different shapes and no mean; give "
            "method.groups=1, which concatenates them at the coarsest grid, or a ViT (backbone=dinov2_small)"
        )
    return differ


def means(tensors: list[Tensor], groups: int) -> list[Tensor]:
    """The mean of each of so many equal groups of neighbours in the list; nothing of an empty list."""
    size = len(tensors) // groups
    parts = [tensors[at : at + size] for at in range(0, len(tensors), max(1, size))]
    return [part[0] if size == 1 else sum(part[1:], part[0]) / size for part in parts]


def distance(target: Tensor, found: Tensor) -> Tensor:
    """1 − cos over the last axis of two tensors of one shape, [B, N, D] -> [B, N]."""
    with torch.autocast(target.device.type, enabled=False):  # the difference of nearly equal numbers
        return 1 - F.cosine_similarity(target, found, dim=-1)


def cosine_loss(target: Tensor, found: Tensor) -> Tensor:
    """1 − cos of each image's flattened map, [B]."""
    return distance(target.flatten(1), found.flatten(1))
