"""Multi-head attention of token transformers: masked, with dropout, within local windows; and dropout itself."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]  # (H, W); the tokens are its cells, row by row, L = H·W
CACHED = 2**19  # attention weights that a CPU computes at once: 2 MB in float32 stay in its cache


class LocalWindow(nn.Module):
    """Exact attention of every query to the window × window keys around it; all images share keys and values.

    The grid is cut into tiles. One dense attention computes a tile: its queries are those of all images, its keys
    those of the tile and its border. tests/benchmarks/bench_rlr.py compares this with masked attention over all L keys
    and with gathered keys.
    """

    allowed: Tensor

    def __init__(self, grid: Grid, window: int, tile: int = 4):
        super().__init__()
        self.grid, self.tile, self.reach = grid, tile, window // 2
        self.tiles = (-(-grid[0] // tile), -(-grid[1] // tile))
        rows, columns = (self._axis(size, count) for size, count in zip(grid, self.tiles, strict=True))
        allowed = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]  # [a, b, t, t, n, n]
        self.register_buffer("allowed", allowed.flatten(4).flatten(2, 3).flatten(0, 1)[:, None], persistent=False)

    def _axis(self, size: int, count: int) -> Tensor:
        """Bool [tiles, t, n]: which of a tile's n = t + 2·reach keys each query sees along one axis.

        Queries beyond the grid, which pad the last tile, see every key: a softmax over no keys is NaN.
        """
        start = self.tile * torch.arange(count)[:, None]
        query, key = start + torch.arange(self.tile), start + torch.arange(-self.reach, self.tile + self.reach)
        near = (query[:, :, None] - key[:, None]).abs() <= self.reach
        return near & ((key >= 0) & (key < size))[:, None] | (query >= size)[:, :, None]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, heads, L, e], key and value [1, heads, L, e] -> [B, heads, L, e]."""
        batch, heads, length, e = query.shape
        (h, w), (a, b), t, n = self.grid, self.tiles, self.tile, self.tile + 2 * self.reach
        down, right = a * t - h, b * t - w  # cells that pad the last tiles

        def bordered(x: Tensor) -> Tensor:  # -> [tiles, heads, n·n, e]
            x = F.pad(x.view(heads, h, w, e), (0, 0, self.reach, self.reach + right, self.reach, self.reach + down))
            return x.unfold(1, n, t).unfold(2, n, t).permute(1, 2, 0, 4, 5, 3).reshape(a * b, heads, n * n, e)

        cells = F.pad(query.reshape(batch, heads, h, w, e), (0, 0, 0, right, 0, down))
        cells = cells.view(batch, heads, a, t, b, t, e).permute(2, 4, 1, 0, 3, 5, 6)
        cells = cells.reshape(a * b, heads, batch * t * t, e)
        parts, allowed = [cells, bordered(key), bordered(value)], self.allowed.repeat(1, 1, batch, 1)
        if query.device.type == "cpu":  # on CPUs, bf16 is slower for small tiles
            parts = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts]
        with torch.autocast(query.device.type, enabled=False):
            out = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], allowed).to(query.dtype)
        out = out.view(a, b, heads, batch, t, t, e).permute(3, 2, 0, 4, 1, 5, 6)
        return out.reshape(batch, heads, a * t, b * t, e)[:, :, :h, :w].reshape(batch, heads, length, e)


def random_noise(x: Tensor) -> Tensor:
    """Uniform integers −32768 to 32767 in the shape of x, as floats. torch.rand draws 32 random bits per number, not
    16, which takes a third of UniAD's training time."""
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return drawn[: x.numel()].view(x.shape).to(torch.promote_types(x.dtype, torch.float32))


def kept(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """x, but 0 where `noise` is among the p · 65536 smallest of its values.

    The gradient of ReLU selects in the same way, and is one pass on CPUs.
    """
    return torch.ops.aten.threshold_backward(x.to(noise.dtype), noise, round(65536 * p) - 32769).to(x.dtype)


def scale(p: float) -> float:
    """1 / (1 − p) for p rounded to a multiple of 1/65536."""
    return 65536 / (65536 - round(65536 * p))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        noise, ctx.p = random_noise(x), p
        ctx.save_for_backward(noise)
        return kept(x, noise, p).mul_(scale(p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (noise,) = ctx.saved_tensors
        return kept(grad, noise, ctx.p).mul_(scale(ctx.p)), None


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout. On CPUs p is rounded to a multiple of 1/65536."""
    return _Drop.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(nn.Dropout):
    """nn.Dropout, computed by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training and self.p else x


class _Attend(torch.autograd.Function):
    """softmax(q·kᵀ / √e), where `seen`, after dropout, times v, for CPUs, for which PyTorch has no kernel with dropout.

    It computes a few heads at a time, so that their weights stay in the processor's cache from step to step.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, p: float) -> Tensor:
        q, ctx.p = q * q.shape[-1] ** -0.5, p
        weights = q.new_empty(*q.shape[:3], k.shape[2])
        used = torch.empty_like(weights)  # after dropout; where a weight was dropped, its gradient is 0
        bias = None if seen is None else torch.where(seen, 0, -torch.inf).to(q.dtype)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        for at in pieces(weights):
            w = torch.bmm(q[at], k[at].mT, out=weights[at])
            if bias is not None:
                w += bias
            torch.softmax(w, -1, out=w)
            used[at] = kept(w, random_noise(w), p)
            out[at] = torch.bmm(used[at], v[at])
        ctx.save_for_backward(q, k, v, weights, used)
        return out.mul_(scale(p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, weights, used = ctx.saved_tensors
        grad = grad * scale(ctx.p)
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        for at in pieces(weights):
            w = weights[at]
            dw = torch.ops.aten.threshold_backward(torch.bmm(grad[at], v[at].mT), used[at], 0)
            dw = torch._softmax_backward_data(dw, w, -1, w.dtype)
            dv[at] = torch.bmm(used[at].mT, grad[at])
            dq[at], dk[at] = torch.bmm(dw, k[at]), torch.bmm(dw.mT, q[at])
        return dq.mul_(q.shape[-1] ** -0.5), dk, dv, None, None


def pieces(weights: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, heads) of parts of [B, heads, L, L'] that hold at most CACHED weights, or one head."""
    step = max(1, CACHED // weights[0, 0].numel())
    for image in range(weights.shape[0]):
        for first in range(0, weights.shape[1], step):
            yield image, slice(first, first + step)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot product attention of [B, heads, L, e]; `seen` is a bool mask [L, L'] (True: seen) or None."""
    if q.device.type != "cpu" or not dropout:
        return F.scaled_dot_product_attention(q, k, v, seen, dropout)
    with torch.autocast("cpu", enabled=False):
        return _Attend.apply(q, k, v, seen, dropout)


def project(*pairs: tuple[nn.Linear, Tensor]) -> list[Tensor]:
    """The output of each linear layer for its input. In training, layers with one input share one matrix product."""
    if not torch.is_grad_enabled():
        return [layer(x) for layer, x in pairs]
    outputs: dict[int, Tensor] = {}
    for x in {id(x): x for _, x in pairs}.values():
        members = {i: layer for i, (layer, given) in enumerate(pairs) if given is x}
        weight, bias = (torch.cat([getattr(y, name) for y in members.values()]) for name in ("weight", "bias"))
        parts = F.linear(x, weight, bias).split([layer.out_features for layer in members.values()], -1)
        outputs |= dict(zip(members, parts, strict=True))
    return [outputs[i] for i in range(len(pairs))]


class Attention(nn.Module):
    """Multi-head attention equal to nn.MultiheadAttention, batch first.

    Keys and values may have batch size 1; then all images share them, and they are projected once.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for part in (self.query, self.key, self.value, self.out):
            # nn.MultiheadAttention draws query, key and value as one matrix with three times the outputs
            nn.init.xavier_uniform_(part.weight, 1 if part is self.out else math.sqrt(0.5))
            nn.init.zeros_(part.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, where: Tensor | LocalWindow | None = None) -> Tensor:
        """query [B, L, d], key and value [B or 1, L', d] -> [B, L, d]; `where` is a bool mask [L, L'] (True: seen)."""
        q, k, v = project((self.query, query), (self.key, key), (self.value, value))
        return self.out(self.read(q, k, v, where))

    def read(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor | LocalWindow | None = None) -> Tensor:
        """The values that projected queries see, before the projection `out`: q [B or 1, L, d], k, v -> [B, L, d]."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if isinstance(where, LocalWindow):
            out = where(q, k, v)
        else:
            batch = max(q.shape[0], v.shape[0])
            q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
            out = attend(q, k, v, where, self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)
