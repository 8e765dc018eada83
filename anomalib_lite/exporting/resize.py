"""Pillow's resizing in operations of PyTorch that torch.export and ONNX know, for images of any size.

Pillow resizes one axis after the other. An output pixel is a weighted sum of input pixels with weights of 22 bits after
the point, rounded to 8 bits after each axis. The weights depend on the input's size and are computed in float64, as in
Pillow. The sums are products of matrices: each block of output pixels has one matrix of weights and its own range of
input pixels. The upper and the lower 11 bits of the weights are multiplied apart, so that float32 holds the sums
exactly. The result equals Pillow's for up to 64 input pixels in a sum, and may differ by 1 of 255 for more.
"""

import math
from collections.abc import Callable

import numpy as np
import PIL
import torch
from torch import Tensor

BITS, LOW_BITS = 22, 11
BLOCK = 16  # output pixels whose sums are one product of matrices
#: since Pillow 13, rows are resized first if the height shrinks by more than twice as many pixels as the width
ROWS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def sinc(x: Tensor) -> Tensor:
    """sin(πx) / πx."""
    angle = x * math.pi
    return torch.where(angle == 0, 1.0, torch.sin(angle) / torch.where(angle == 0, 1.0, angle))


def hamming(x: Tensor) -> Tensor:
    """A sinc under Hamming's window, whose two constants are of type float in Pillow."""
    window = float(np.float32(0.54)) + float(np.float32(0.46)) * torch.cos(x * math.pi)
    return torch.where(x.abs() < 1, sinc(x) * window, 0.0)


def bicubic(x: Tensor) -> Tensor:
    """Keys's cubic with a = −0.5."""
    x = x.abs()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


#: for each of Pillow's filters half of its width at scale 1, and its weight at a distance
FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "box": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).double()),
    "bilinear": (1, lambda x: (1 - x.abs()).clamp_min(0)),
    "hamming": (1, hamming),
    "bicubic": (2, bicubic),
    "lanczos": (3, lambda x: torch.where((x >= -3) & (x < 3), sinc(x) * sinc(x / 3), 0.0)),
}


def resized(images: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """Images uint8 [B, H, W, 3] at (height, width), as `PIL.Image.resize` gives them, uint8 [B, height, width, 3].

    `resample` is a name of Pillow's filters, see `data.transforms.Resize`.
    """
    (height, width), (h, w) = images.shape[1:3], size
    if resample == "nearest":
        return images[:, nearest(height, h)][:, :, nearest(width, w)]

    given = images, *axis_weights(height, h, resample), *axis_weights(width, w, resample)

    def rows_first(x: Tensor, at_rows: Tensor, of_rows: Tensor, at_columns: Tensor, of_columns: Tensor) -> Tensor:
        return resized_columns(resized_rows(x, at_rows, of_rows, h), at_columns, of_columns, w).contiguous()

    def columns_first(x: Tensor, at_rows: Tensor, of_rows: Tensor, at_columns: Tensor, of_columns: Tensor) -> Tensor:
        return resized_rows(resized_columns(x, at_columns, of_columns, w), at_rows, of_rows, h).contiguous()

    if not ROWS_FIRST:
        return columns_first(*given)
    if not torch.compiler.is_exporting():
        return (rows_first if height - h > max(0, 2 * (width - w)) else columns_first)(*given)
    shrinks = torch.scalar_tensor(height - h, dtype=torch.int64), torch.scalar_tensor(width - w, dtype=torch.int64)
    return torch.cond((shrinks[0] > 0) & (shrinks[0] > 2 * shrinks[1]), rows_first, columns_first, given)


def nearest(length: int, size: int) -> Tensor:
    """The input pixel of each of `size` output pixels, int64 [size]. Pillow adds up the steps, with their rounding."""
    scale = torch.scalar_tensor(length, dtype=torch.float64) / size
    steps = torch.tensor([0.5, *[1.0] * (size - 1)], dtype=torch.float64)
    return (steps * scale).cumsum(0).long()


def axis_weights(n: int, size: int, resample: str) -> tuple[Tensor, Tensor]:
    """How `size` output pixels of an axis follow from n input pixels, in blocks.

    Returns:
        The input pixels that each block sees, int64 [blocks, taps]; and the upper and lower bits of their weights,
        float32 [blocks, 2 BLOCK, taps].
    """
    (radius, weight), blocks = FILTERS[resample], -(-size // BLOCK)
    double = int(2 * radius)
    # at least as many input pixels as a block of outputs sees; all terms are positive, since ONNX rounds towards 0
    taps = ((BLOCK - 1) * n + size - 1) // size + 2 * torch.sym_max((double * n + 2 * size - 1) // (2 * size), double)
    scale = torch.scalar_tensor(n, dtype=torch.float64) / size
    stretch = scale.clamp_min(1)
    centre = (torch.arange(blocks * BLOCK, dtype=torch.float64) + 0.5) * scale
    first = (centre - radius * stretch + 0.5).clamp_min(0).long()
    end = (centre + radius * stretch + 0.5).long().clamp_max(n)
    at = first[::BLOCK, None] + torch.arange(taps + 2)
    seen = at.repeat_interleave(BLOCK, 0)  # by each output pixel
    weights = weight((seen - centre[:, None] + 0.5) * (torch.ones((), dtype=torch.float64) / stretch))
    weights = torch.where((seen >= first[:, None]) & (seen < end[:, None]), weights, 0.0)
    total = weights.cumsum(1)[:, -1:]  # added up in Pillow's order
    weights = weights / torch.where(total == 0, 1.0, total)  # output pixels that fill the last block see nothing
    fixed = weights.sign() * (weights.abs() * 2**BITS + 0.5).floor()
    high = (fixed / 2**LOW_BITS).round()
    both = torch.stack([high, fixed - high * 2**LOW_BITS]).float()
    return at.clamp_max(n - 1), both.unflatten(1, (blocks, BLOCK)).transpose(0, 1).flatten(1, 2)


def resized_rows(x: Tensor, at: Tensor, weights: Tensor, size: int) -> Tensor:
    """Axis 1 of uint8 [B, n, M, 3] at another length by `axis_weights`, uint8 [B, size, M, 3]."""
    sums = (weights @ x.flatten(2)[:, at].float()).int()  # [B, blocks, 2 BLOCK, 3 M]
    upper, lower = sums.unflatten(2, (2, BLOCK)).unbind(2)
    fixed = (upper * 2**LOW_BITS + lower + 2 ** (BITS - 1)).double()  # ONNX divides integers in float32
    rounded = (fixed * 0.5**BITS).floor().clamp(0, 255).to(torch.uint8)
    return rounded.flatten(1, 2)[:, :size].unflatten(2, (-1, 3))


def resized_columns(x: Tensor, at: Tensor, weights: Tensor, size: int) -> Tensor:
    """Axis 2 of uint8 [B, M, n, 3] at another length, uint8 [B, M, size, 3]."""
    return resized_rows(x.transpose(1, 2), at, weights, size).transpose(1, 2)
