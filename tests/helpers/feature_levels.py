"""A stand-in for the backbone, and batches of its images."""

from typing import Any

import torch
from torch import nn


class Levels(nn.Module):
    """At 32²: two feature maps, 8² and 4², that the image's first pixels hold."""

    reductions = (4, 8)
    sides = (8, 4)

    def __init__(self, channels: tuple[int, int]):
        super().__init__()
        self.channels = channels

    def forward(self, images):
        maps, at = [], 0
        for c, side in zip(self.channels, self.sides, strict=True):
            maps.append(images.flatten(1)[:, at : at + c * side**2].unflatten(1, (c, side, side)))
            at += c * side**2
        return maps


def batch(count: int = 3, seed: int = 0) -> dict[str, Any]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "path": [f"{seed}-{i}" for i in range(count)]}
