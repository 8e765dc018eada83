"""Cosine distances of feature maps."""

import torch
from torch import Tensor


def products(target: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨t, r⟩, ‖t‖² and ‖r‖² over the channels of maps [..., C, H, W], [..., H, W] each, at least in float32."""
    kind = torch.promote_types(target.dtype, torch.float32)
    t, r = target.to(kind), reconstruction.to(kind)
    return (t * r).sum(-3), (t * t).sum(-3), (r * r).sum(-3)


def cosine(dot: Tensor, target2: Tensor, reconstruction2: Tensor) -> Tensor:
    """⟨t, r⟩ / (‖t‖‖r‖). A reconstruction of zeros has the cosine 0 and a finite gradient."""
    smallest = torch.finfo(reconstruction2.dtype).tiny
    return dot / (target2.sqrt() * reconstruction2.clamp_min(smallest).sqrt()).clamp_min(1e-8)


def distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """1 − cos over channels, [B, H, W]."""
    return 1 - cosine(*products(target, reconstruction))
