"""Building blocks of token transformers: position encodings, neighbour masks, attention, UniAD's transformer."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule

Grid = tuple[int, int]  # (H, W); the tokens are its cells, row by row, L = H·W


def token_grids(method: AnomalyModule) -> list[Grid]:
    """The grid of tokens for every level of the method's backbone.

    Raises UserError if test images and training images differ in size: the transformers' grids are fixed.
    """
    assert method.backbone is not None
    if method.test_size != method.image_size:
        size, side = method.test_size, "×".join(map(str, method.image_size))
        shown = size if isinstance(size, str) else "×".join(map(str, size))
        raise UserError(
            f"data.texture_size={shown}: {type(method).__name__} has a fixed grid of tokens, so training and test need "
            f"one size: give data.texture_size the value of data.image_size={side}, or data.treatment=object"
        )
    h, w = method.image_size
    if known := getattr(method.backbone, "grids", {}).get((h, w)):
        return known
    return [(-(-h // reduction), -(-w // reduction)) for reduction in method.backbone.reductions]


def jitter(tokens: Tensor, scale: float) -> Tensor:
    """UniAD's feature jitter of tokens [B, L, C]: x + ε · ‖x‖₂ / C · scale with ε ~ N(0, I), on every token."""
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens + torch.randn_like(tokens) * (norms * (scale / tokens.shape[-1]))


def sine_positions(grid: Grid, dim: int) -> Tensor:
    """Fixed 2-D sine and cosine encoding [L, dim], frequencies 1e4^(−4i/dim): the first half of the channels holds the
    row, the second the column; `dim` is a multiple of 4."""
    frequencies = 1e4 ** (-4 * torch.arange(dim // 4, dtype=torch.float64) / dim)
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    y, x = (torch.stack((angle.sin(), angle.cos()), -1).flatten(1) for angle in (rows, columns))
    both = torch.cat((y[:, None].expand(-1, grid[1], -1), x.expand(grid[0], -1, -1)), -1)
    return both.flatten(0, 1).float()


class LearnedPositions(nn.Module):
    """A learned encoding [L, dim], initially from U(0, 1): half of the channels encode the column, half the row."""

    def __init__(self, grid: Grid, dim: int):
        super().__init__()
        self.column = nn.Parameter(torch.rand(grid[1], dim // 2))
        self.row = nn.Parameter(torch.rand(grid[0], dim // 2))

    def forward(self) -> Tensor:
        h, w = len(self.row), len(self.column)
        return torch.cat((self.column.expand(h, -1, -1), self.row[:, None].expand(-1, w, -1)), -1).flatten(0, 1)


def near(grid: Grid, window: int) -> Tensor:
    """Bool [L, L]: True if the key is in the window × window cells around the query (clipped at the border)."""
    rows, columns = (torch.arange(n) for n in grid)
    y, x = rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
    return ((y[:, None] - y).abs() <= window // 2) & ((x[:, None] - x).abs() <= window // 2)


def largest_window(grid: Grid) -> int:
    """The largest odd window that can be masked so that every query still sees a key; -1 if no window can."""
    return 2 * (max(grid) // 2) - 1


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


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout. On CPUs it draws 16 random bits per element, so p is rounded to a multiple of 1/65536. torch draws
    32 bits, which takes a third of UniAD's training time."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(65536 * p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape) >= dropped - 32768
    return x * keep * (65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    """nn.Dropout, computed by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training and self.p else x


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot product attention of [B, heads, L, e]; `seen` is a bool mask [L, L'] (True: seen) or None."""
    if not dropout or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, seen, dropout)
    with torch.autocast("cpu", enabled=False):  # PyTorch has no fused CPU kernel for dropout
        bias = q.new_zeros(()) if seen is None else torch.where(seen, 0, -torch.inf).to(q.dtype)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
        return (drop(scores.softmax(-1), dropout) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


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
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        if isinstance(where, LocalWindow):
            out = where(q, k, v)
        else:
            k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
            out = attend(q, k, v, where, self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def feed_forward(
    dim: int, hidden: int, activation: nn.Module, dropout: float = 0.0, layer: Callable[[int, int], nn.Module] = linear
) -> nn.Sequential:
    return nn.Sequential(layer(dim, hidden), activation, Dropout(dropout), layer(hidden, dim))


class EncoderLayer(nn.Module):
    """DETR's post-norm encoder layer: it adds positions to queries and keys, not to values."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.ffn = feed_forward(dim, hidden, nn.ReLU(), dropout)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self.drop(self.attention(placed, placed, x, mask)))
        return self.norm2(x + self.drop(self.ffn(x)))


class QueryDecoderLayer(nn.Module):
    """UniAD's layer-wise query decoder. One learned query per position attends to the encoder's output; the result
    attends to the previous layer's output. No residual connection bypasses the attention with the input."""

    def __init__(self, length: int, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.query = nn.Parameter(torch.randn(length, dim))
        self.to_memory, self.to_previous = Attention(dim, heads, dropout), Attention(dim, heads, dropout)
        self.ffn = feed_forward(dim, hidden, nn.ReLU(), dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = Dropout(dropout)

    def forward(self, previous: Tensor, memory: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = self.query.expand(memory.shape[0], -1, -1)
        x = self.norm1(x + self.drop(self.to_memory(x + positions, memory + positions, memory, mask)))
        x = self.norm2(x + self.drop(self.to_previous(x + positions, previous + positions, previous, mask)))
        return self.norm3(x + self.drop(self.ffn(x)))


class ReconstructionTransformer(nn.Module):
    """UniAD's transformer (You et al., NeurIPS 2022): tokens [B, L, C] -> their reconstruction [B, L, C].

    Args:
        neighbours: the attention masks the neighbours × neighbours cells around the query, including its own cell;
            None: no mask.
    """

    mask: Tensor | None

    def __init__(
        self,
        channels: int,
        grid: Grid,
        dim: int = 256,
        layers: int = 4,
        heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.1,
        neighbours: int | None = 7,
    ):
        super().__init__()
        self.inputs, self.outputs = linear(channels, dim), linear(dim, channels)
        self.positions = LearnedPositions(grid, dim)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout) for _ in range(layers))
        length = grid[0] * grid[1]
        self.decoder = nn.ModuleList(QueryDecoderLayer(length, dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        mask = None if neighbours is None else ~near(grid, neighbours)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions()
        memory = self.inputs(tokens).to(tokens.dtype)  # the residual sums of all layers stay in float32
        for layer in self.encoder:
            memory = layer(memory, positions, self.mask)
        x = memory
        for layer in self.decoder:
            x = layer(x, memory, positions, self.mask)
        with torch.autocast(x.device.type, enabled=False):  # the map is a difference of nearly equal numbers
            return self.outputs(self.norm(x))
