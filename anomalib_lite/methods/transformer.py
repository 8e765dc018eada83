"""Building blocks of token transformers: position encodings, neighbour masks, UniAD's transformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.attention import Attention, Dropout, Grid, project
from anomalib_lite.methods.base import AnomalyModule


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

    def forward(self, previous: Tensor, key: Tensor, value: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """`key` and `value` [B, L, d] are the encoder's output with positions and without, projected by `to_memory`."""
        query = self.to_memory.query(self.query + positions)[None]  # the same for all images
        x = self.query + self.drop(self.to_memory.out(self.to_memory.read(query, key, value, mask)))
        x = self.norm1(x)
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
        placed, blocks = memory + positions, [layer.to_memory for layer in self.decoder]
        keys = project(*((block.key, placed) for block in blocks))  # type: ignore[arg-type, union-attr]
        values = project(*((block.value, memory) for block in blocks))  # type: ignore[arg-type, union-attr]
        x = memory
        for layer, key, value in zip(self.decoder, keys, values, strict=True):
            x = layer(x, key, value, positions, self.mask)
        with torch.autocast(x.device.type, enabled=False):  # the map is a difference of nearly equal numbers
            return self.outputs(self.norm(x))
