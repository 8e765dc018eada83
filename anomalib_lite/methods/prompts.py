"""Embeddings of classes and of their normal and abnormal states for LTAD: from a text encoder, or without text.

Both kinds offer `start` (the learned parameters of all classes), `classes` and `states` (embeddings of every class, and
of its normal and its abnormal state) and `image` (an image's embedding, from LTAD's kept outputs of the backbone).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.vision_language import VisionLanguage

PROMPTS = {"class": "a photo of a {}", "normal": "a photo of a flawless {}", "abnormal": "a photo of a damaged {}"}


class Prompts:
    """A class is the embedding of one token, its pseudo name s_c, in prompts that a frozen text encoder reads."""

    learns_states = False

    def __init__(self, backbone: VisionLanguage, prompts: dict[str, str]):
        for key in PROMPTS:
            if prompts.get(key, "").count("{}") != 1:
                raise UserError(
                    f"method.prompts.{key}={prompts.get(key)}: give a text in which {{}} stands for the class"
                )
        self.backbone, self.prompts, self.dim = backbone.embedding(), prompts, backbone.dim

    def start(self, categories: Sequence[str], fixed: bool) -> Tensor:
        """[K, width]: random with the spread of the encoder's tokens; with `fixed` the mean of the name's tokens."""
        table = self.backbone.table.weight.detach()
        if not fixed:
            return torch.randn(len(categories), table.shape[1]) * table.std()
        return torch.stack([table[self.backbone.ids(name.replace("_", " "))[1:-1]].mean(0) for name in categories])

    def classes(self, names: Tensor) -> Tensor:
        """[K, dim]."""
        return self.backbone.prompt(self.prompts["class"], names)

    def states(self, names: Tensor) -> Tensor:
        """[K, 2, dim]: normal, abnormal."""
        return torch.stack([self.backbone.prompt(self.prompts[key], names) for key in ("normal", "abnormal")], 1)

    def image(self, levels: list[Tensor]) -> Tensor:
        """[B, dim], the last output of the backbone."""
        return levels[-1].flatten(1)


class TextFree(nn.Module):
    """Without text: a class is a vector in the space of the deepest level's mean, and each of its two states adds an
    offset. All vectors are learned directly."""

    learns_states = True

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.dim = dim
        self.offsets = nn.Parameter(torch.randn(count, 2, dim) * dim**-0.5)

    def start(self, categories: Sequence[str], fixed: bool) -> Tensor:
        """[K, dim], random; `fixed` changes nothing here."""
        return torch.randn(len(categories), self.dim) * self.dim**-0.5

    def classes(self, names: Tensor) -> Tensor:
        """[K, dim]."""
        return names

    def states(self, names: Tensor) -> Tensor:
        """[K, 2, dim]: normal, abnormal."""
        return names[:, None] + self.offsets

    def image(self, levels: list[Tensor]) -> Tensor:
        """[B, dim], the mean over positions of the deepest level, which is the end of the joined map's channels."""
        return levels[-1][:, -self.dim :].mean((2, 3))
