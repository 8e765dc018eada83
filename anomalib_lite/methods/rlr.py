"""RLR: learning unified reference representation for unsupervised multi-class anomaly detection (He et al., ECCV 2024,
arXiv 2403.11561).

A transformer reconstructs the frozen features of a level. Its layers see the image only through attention to a
learnable reference, one vector per position, which all images and classes share. Features without a match in the
reference are not reconstructed. Levels are independent models. Initial weights are drawn as in the authors' code:
PyTorch's own for linear layers and nn.MultiheadAttention, kaiming-normal for the two embeddings.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.attention import Attention, Grid, LocalWindow, project
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.options import check_clip, check_counts, check_from_0
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.transformer import feed_forward, jitter, largest_window, near, sine_positions, token_grids

WINDOWS = {(16, 16): 5, (32, 32): 7, (64, 64): 11}  # published


def attention(dim: int, heads: int) -> Attention:
    """Attention with nn.MultiheadAttention's initial weights: its output projection is nn.Linear's with zero bias."""
    made = Attention(dim, heads)
    made.out.reset_parameters()
    nn.init.zeros_(made.out.bias)
    return made


def embedding(channels: int, dim: int) -> nn.Linear:
    """A linear layer with weights from N(0, 2 / channels) and nn.Linear's bias."""
    layer = nn.Linear(channels, dim)
    nn.init.kaiming_normal_(layer.weight)  # fan_in, gain √2
    return layer


class Layer(nn.Module):
    """y = LN(a·A + b·B), without a residual connection from x; the output is LN(y + FFN(y)).

    A = MHA(x, r, r) sees only the local window (locality constraint). B = MHA(x, r, x) sees everything except the local
    window (masked learnable key attention).
    """

    def __init__(self, dim: int, heads: int, mix: Sequence[float], learnable_key: bool):
        super().__init__()
        self.mix, self.learnable_key = mix, learnable_key
        self.local, self.masked = (attention(dim, heads) if weight else None for weight in mix)
        self.ffn = feed_forward(dim, 4 * dim, nn.GELU(), layer=nn.Linear)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, r: Tensor, window: LocalWindow | None, outside: Tensor | None) -> Tensor:
        """x [B, L, d], r [1, L, d] -> [B, L, d]."""
        pairs: list[tuple[nn.Linear, Tensor]] = []
        reads: list[tuple[float, Attention, LocalWindow | Tensor | None]] = []
        if self.local is not None:
            pairs += [(self.local.query, x), (self.local.key, r), (self.local.value, r)]
            reads += [(self.mix[0], self.local, window)]
        if self.masked is not None:
            key = r if self.learnable_key else x
            pairs += [(self.masked.query, x), (self.masked.key, key), (self.masked.value, x)]
            reads += [(self.mix[1], self.masked, outside)]
        projected = iter(project(*pairs))
        found = [
            block.out(block.read(next(projected), next(projected), next(projected), where)).to(x.dtype)
            for _, block, where in reads
        ]
        y = found[0] * reads[0][0]
        if len(found) == 2:
            y = torch.add(y, found[1], alpha=reads[1][0])
        y = self.norm1(y)
        return self.norm2(y + self.ffn(y))


class Level(nn.Module):
    """The model of one level: tokens [B, L, C] -> their reconstruction [B, L, C]."""

    positions: Tensor
    outside: Tensor | None

    def __init__(
        self,
        channels: int,
        grid: Grid,
        window: int,
        dim: int,
        layers: int,
        heads: int,
        mix: Sequence[float],
        locality: bool,
        masked: bool,
        learnable_key: bool,
    ):
        super().__init__()
        self.reference = nn.Parameter(torch.randn(grid[0] * grid[1], channels))
        self.embed, self.embed_reference = embedding(channels, dim), embedding(channels, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, mix, learnable_key) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, channels)
        self.window = LocalWindow(grid, window) if locality else None
        self.register_buffer("positions", sine_positions(grid, dim), persistent=False)
        self.register_buffer("outside", ~near(grid, window) if masked else None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions  # float32: between the attentions' and the FFN's matrix products
        r = self.embed_reference(self.reference[None]) + self.positions
        for layer in self.layers:
            x = layer(x, r, self.window, self.outside)
        with torch.autocast(x.device.type, enabled=False):  # the map is a difference of nearly equal numbers
            return self.head(self.norm(x))


def error(found: Tensor, tokens: Tensor) -> Tensor:
    """Error of every token: mean squared difference over channels plus 1 − cosine; [B, L, C] twice -> [B, L]."""
    return (found - tokens).square().mean(-1) + 1 - F.cosine_similarity(found, tokens, dim=-1)


class RLR(AnomalyModule):
    """Feature reconstruction from learnable references, with one model per level.

    Args:
        windows: side of the local window of every level, odd; None is the published one for 16², 32² and 64² tokens.
        dims: width of the tokens inside every level's model; None is the published 32 × the level's reduction (512 at
            16² of 256²).
        jitter: scale of the features' noise in training.
        mix: weights (a, b) of the two attention blocks; a block of weight 0 is left out.
        locality: whether A sees only the local window. masked: whether B sees everything except the local window.
        learnable_key: whether B's keys come from the reference instead of the image.
        zero_fill: one optimiser step per level, in which the levels that were stepped before have gradients of zero,
            as the authors' code does under torch 1.12. Otherwise the levels' losses are summed, and there is one step.
        clip: largest norm of a step's gradient; None, as published, is no limit.
    """

    frozen_features = True
    uses_images = False

    def __init__(
        self,
        windows: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        layers: int = 4,
        heads: int = 8,
        jitter: float = 4.0,
        mix: Sequence[float] = (2, 1),
        locality: bool = True,
        masked: bool = True,
        learnable_key: bool = True,
        zero_fill: bool = False,
        clip: float | None = None,
        **context: Any,
    ):
        super().__init__(**context)
        assert self.backbone is not None
        grids = token_grids(self)
        if len(mix) != 2 or min(mix) < 0 or not any(mix):
            raise UserError(f"method.mix={list(mix)}: give the two blocks' weights, such as [2,1]: from 0, not both 0")
        check_counts(layers=layers, heads=heads)
        check_from_0(jitter=jitter)
        check_clip(clip)
        self.jitter, self.clip, self.automatic_optimization = jitter, clip, not zero_fill
        self.mix, self.locality, self.masked = list(mix), locality, masked
        self.unused_parameters = zero_fill or (not mix[0] and not learnable_key)  # other levels; the reference
        dims = per_level("dims", [32 * r for r in self.backbone.reductions] if dims is None else dims, grids)
        if any(dim < 1 or dim % heads or dim % 4 for dim in dims):
            raise UserError(f"method.dims={dims}: give multiples of 4 and of method.heads={heads}")
        self.levels = nn.ModuleList(
            Level(channels, grid, window, dim, layers, heads, mix, locality, masked, learnable_key)
            for channels, grid, window, dim in zip(
                self.backbone.channels, grids, chosen_windows(windows, grids, masked), dims, strict=True
            )
        )

    def networks(self) -> list[nn.Module]:
        return list(self.levels)

    def without_effect(self) -> dict[str, str]:
        mix, unused = f"method.mix={self.mix}", {}
        if not self.mix[0]:
            unused["locality"] = mix
        if not self.mix[1]:
            unused |= {"masked": mix, "learnable_key": mix}
        if not (self.mix[0] and self.locality) and not (self.mix[1] and self.masked):
            switches = f"method.locality={str(self.locality).lower()} and method.masked={str(self.masked).lower()}"
            unused["windows"] = f"{mix}, {switches}"
        if len(self.levels) == 1:
            unused["zero_fill"] = "one level in backbone.layers"
        if not self.automatic_optimization:
            unused |= dict.fromkeys(("scheduler", "clip"), "method.zero_fill=true")
        return unused

    def errors(self, batch: Batch, noise: float) -> Iterator[Tensor]:
        """For each level the reconstruction's error at every position, [B, H, W]."""
        for level, features in zip(self.levels, self.features(batch), strict=True):
            pooled = F.avg_pool2d(features, 3, 1, 1)
            tokens = pooled.flatten(2).mT.contiguous()
            with self.autocast():
                found = level(jitter(tokens, noise) if noise else tokens)
            yield error(found, tokens).unflatten(1, pooled.shape[2:])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum over levels of the mean error of jittered tokens' reconstructions."""
        losses = []
        for errors in self.errors(batch, self.jitter):
            losses.append(errors.mean())
            if not self.automatic_optimization:
                optimizer: Any = self.optimizers()
                for parameter in self.levels.parameters():  # without a state, a level had no gradient yet: no step
                    stepped = parameter in optimizer.state
                    parameter.grad = torch.zeros_like(parameter) if stepped else None
                self.manual_backward(losses[-1])
                optimizer.step()
        return torch.stack(losses).sum()

    def held_out_loss(self, batch: Batch) -> Tensor:
        return torch.stack([errors.mean((1, 2)) for errors in self.errors(batch, 0.0)]).sum(0)

    def anomaly_map(self, batch: Batch) -> Tensor:
        maps = [resize(each[:, None], self.image_size, align_corners=True)[:, 0] for each in self.errors(batch, 0.0)]
        return torch.stack(maps).mean(0)


def per_level(name: str, values: Sequence[int], grids: list[Grid]) -> list[int]:
    if len(values) != len(grids):
        raise UserError(f"method.{name}={list(values)}: give one for each of the backbone's {len(grids)} levels")
    return list(values)


def chosen_windows(windows: Sequence[int] | None, grids: list[Grid], masked: bool) -> list[int]:
    """The local window of every level: the given one, or the published one."""
    if windows is None:
        for h, w in grids:
            if (h, w) not in WINDOWS:
                raise UserError(
                    f"method.windows: the paper has windows for 16², 32² and 64² tokens, and a level has {h}×{w}; "
                    f"give one odd number for each of the {len(grids)} levels, or choose another data.image_size"
                )
        return [WINDOWS[grid] for grid in grids]
    for window, grid in zip(per_level("windows", windows, grids), grids, strict=True):
        if window < 1 or window % 2 == 0:
            raise UserError(f"method.windows={list(windows)}: {window} is not an odd number from 1")
        if masked and window > largest_window(grid):
            raise UserError(
                f"method.windows={list(windows)}: {window} leaves nothing outside on a grid of {grid[0]}×{grid[1]} "
                f"tokens; give at most {largest_window(grid)}, or a larger data.image_size"
            )
    return list(windows)
