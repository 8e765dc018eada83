"""Patch features: a backbone's levels, pooled and brought to one grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_lite.methods.resizing import resize


def patch_features(levels: list[Tensor]) -> Tensor:
    """φ: levels [B, C_i, H_i, W_i], each 3×3 average-pooled, brought to the first one's grid: [B, ΣC_i, H_0, W_0]."""
    pooled = [F.avg_pool2d(level, 3, 1, 1) for level in levels]
    size = pooled[0].shape[-2:]
    return torch.cat([pooled[0], *(resize(x, size) for x in pooled[1:])], 1)


def projection(weight: Tensor, levels: list[Tensor], origin: Tensor | None = None) -> Tensor:
    """Pφ − c of P [dim, ΣC_i, 1, 1] and c [dim] or 0, [B, dim, H_0, W_0].

    Resizing is linear, so each level is projected on its own grid and then resized: half the work for wide_resnet50_2.
    """
    pooled = [F.avg_pool2d(level, 3, 1, 1) for level in levels]
    first, *columns = weight.split([level.shape[1] for level in levels], 1)
    z = F.conv2d(pooled[0], first, None if origin is None else -origin)
    for x, w in zip(pooled[1:], columns, strict=True):
        z = z + resize(F.conv2d(x, w), z.shape[-2:])
    return z
