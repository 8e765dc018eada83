"""Stand-ins for the backbone, and batches of images for one of them."""

from typing import Any

import torch
from torch import Tensor, nn


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


class ChannelLevels(nn.Module):
    """Levels are parts of the image's channels, the `halved` ones at half the size.

    Class and register tokens are the first pixels of the last row.
    """

    frozen = True

    def __init__(self, channels: tuple[int, ...] = (3, 2), halved: tuple[int, ...] = (1,), tokens: int = 0):
        super().__init__()
        self.channels, self.halved, self.tokens, self.class_token = list(channels), halved, tokens, tokens > 0
        self.reductions = [2 if i in halved else 1 for i in range(len(channels))]

    def forward(self, images: Tensor) -> list[Tensor]:
        parts = images.split(self.channels, 1)
        maps = [x[..., ::2, ::2] if i in self.halved else x for i, x in enumerate(parts)]
        return maps + [x[:, :, -1:, : self.tokens] for x in maps] * bool(self.tokens)


def batch(count: int = 3, seed: int = 0) -> dict[str, Any]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "path": [f"{seed}-{i}" for i in range(count)]}
