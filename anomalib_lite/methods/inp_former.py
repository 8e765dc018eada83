"""INP-Former: exploring intrinsic normal prototypes within a single image (Luo et al., CVPR 2025, arXiv 2503.02424).

A few learnable tokens read an image's own normal prototypes from its features, and the decoder sees nothing else of
them than attention to these prototypes. Encoder, groups, sizes, score and initial weights are those of Dinomaly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.methods.dinomaly import bottleneck
from anomalib_lite.methods.options import check_counts, check_dropout, check_from_0
from anomalib_lite.methods.vit_decoder import GroupedReconstruction, by_heads, linear, mlp, norm


class Extractor(nn.Module):
    """Prototypes [B, M, D] of features [B, N, D]: T ← T + CrossAttention(LN₁T; LN₁F), T ← T + MLP(LN₂T)."""

    def __init__(self, dim: int, heads: int, prototypes: int):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Parameter(torch.randn(prototypes, dim))
        self.norm1, self.norm2, self.mlp = norm(dim), norm(dim), mlp(dim)
        self.query, self.key, self.value, self.project = (linear(dim, dim) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        tokens, read = self.tokens.expand(features.shape[0], -1, -1), self.norm1(features)
        parts = self.query(self.norm1(tokens)), self.key(read), self.value(read)
        q, k, v = (by_heads(part, self.heads) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(out)
        return tokens + self.mlp(self.norm2(tokens))


class GuidedBlock(nn.Module):
    """A decoder block: x ← project(ReLU(s · cos(q, k)) v), without a residual connection, then x ← x + MLP(LN₂x).

    q comes from LN₁x, k and v from LN₁P; the cosine is per head, and so is the learnable scale s, initially 1.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.mlp = norm(dim), norm(dim), mlp(dim)
        self.query, self.key, self.value, self.project = (linear(dim, dim) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        read = self.norm1(prototypes)
        parts = self.query(self.norm1(x)), self.key(read), self.value(read)
        q, k, v = (by_heads(part, self.heads) for part in parts)
        weights = F.relu(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale)
        x = self.project((weights @ v).transpose(1, 2).flatten(2)).to(x.dtype)
        return x + self.mlp(self.norm2(x))


def coherence(features: Tensor, prototypes: Tensor) -> Tensor:
    """Mean over tokens of min over prototypes of 1 − cos; features [B, N, D], prototypes [B, M, D]."""
    cosines = F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).mT
    return (1 - cosines.amax(-1)).mean()


class INPFormer(GroupedReconstruction):
    """INP-Former.

    Args:
        prototypes: M, the number of an image's prototypes.
        coherence: weight of the coherence loss.
        power: γ of the gradient's factor (d / mean d)^γ; 0 leaves the gradient.
        dropout: of the bottleneck.
    """

    def __init__(
        self, prototypes: int = 6, coherence: float = 0.2, power: float = 3.0, dropout: float = 0.0, **context: Any
    ):
        super().__init__(**context)
        check_counts(prototypes=prototypes)
        check_from_0(coherence=coherence, power=power)
        check_dropout(dropout)
        self.coherence, self.power = coherence, power
        self.extractor = Extractor(self.dim, self.heads, prototypes)
        self.bottleneck = bottleneck(self.dim, dropout, None)
        self.decoder = nn.ModuleList(GuidedBlock(self.dim, self.heads) for _ in range(self.blocks))

    def reconstructed(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | float]:
        prototypes, outputs = self.extractor(tokens), []
        x = self.bottleneck(tokens).to(tokens.dtype)
        for block in self.decoder:
            x = block(x, prototypes)
            outputs.append(x)
        if not self.training:  # nothing needs its loss there, and torch.export fails on what nothing needs
            return outputs, 0.0
        with torch.autocast(tokens.device.type, enabled=False):
            return outputs, self.coherence * coherence(tokens, prototypes.to(tokens.dtype))

    def gradient_scale(self, distances: Tensor) -> Tensor | None:
        distances = distances.clamp_min(0)  # rounding gives −1e-7, which has no power such as 2.5
        return (distances / distances.mean()) ** self.power if self.power else None
