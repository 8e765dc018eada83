"""Bilinear resizing that stays fast on a GPU under deterministic algorithms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Maps [B, C, h, w], resized to [B, C, H, W] as `F.interpolate(mode="bilinear")` does.

    On a GPU under deterministic algorithms F.interpolate becomes gathers and a chain of operations on whole maps. Only
    its backward pass is not deterministic. So we call the native kernel where no gradient passes. Where one passes,
    bilinear resizing is separable: it is two products with small matrices, which are deterministic in both directions.
    """
    if x.is_cpu or not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.aten.upsample_bilinear2d(x, list(size), align_corners)
    return resize_by_products(x, size, align_corners)


def resize_by_products(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """R_h x R_wᵀ for each channel. Computed in at least float32, in which autocast would leave bfloat16."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (
            _weights(before, after, align_corners, x.device, dtype)
            for before, after in zip(x.shape[-2:], size, strict=True)
        )
        return (rows @ (x.to(dtype) @ columns.mT)).to(x.dtype)


def _weights(before: int, after: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights [after, before] of the pixels along one axis: max(0, 1 − |s_i − j|) at the source position s_i."""
    places = torch.arange(after, device=device, dtype=dtype)
    if align_corners:
        sources = places * ((before - 1) / max(1, after - 1))
    else:
        sources = ((places + 0.5) * (before / after) - 0.5).clamp(0, before - 1)
    return (1 - (sources[:, None] - torch.arange(before, device=device, dtype=dtype)).abs()).relu()
