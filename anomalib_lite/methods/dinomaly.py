"""Dinomaly: the less is more philosophy in multi-class unsupervised anomaly detection (Guo et al., CVPR 2025, arXiv
2405.14325), and the changes of Dinomaly2 (code preview of May 2026).

A bottleneck with dropout and a decoder with linear attention reconstruct groups of blocks of a frozen ViT. Positions
that are reconstructed well get a tenth of their gradient. With several devices, each finds them in its own part of
the batch.

Three things differ from the authors' code. timm resamples the encoder's position embedding to the grid by size and with
antialiasing, and theirs by a scale of (28 + 0.1)/37 without it. Masks are resized by PIL's nearest instead of torch's.
On CPUs, dropout rates are rounded to a multiple of 1/65536.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.attention import Dropout
from anomalib_lite.methods.options import unused_by_variant
from anomalib_lite.methods.vit_decoder import GroupedReconstruction, by_heads, linear, mlp, norm


class LinearAttention(nn.Module):
    """q(kᵀv) / (q · Σₙ kₙ + eps) per head with q ← elu(q) + 1 and k ← elu(k) + 1, projected; [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.qkv, self.project = linear(dim, 3 * dim), linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (by_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        exact = torch.promote_types(q.dtype, torch.float32)  # in bf16, 1 + elu is 0 from −6 on
        q, k = F.elu(q.to(exact)) + 1, F.elu(k.to(exact)) + 1
        out = (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + self.eps)
        return self.project(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: x ← x + attention(LN x), x ← x + MLP(LN x)."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attention, self.mlp = LinearAttention(dim, heads, eps), mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def bottleneck(dim: int, dropout: float, narrow: int | None) -> nn.Sequential:
    """Dropout, Linear(D, 4D), GELU, dropout, Linear(4D, D), dropout. With `narrow`, Linear(D, narrow) comes first."""
    first = [] if narrow is None else [linear(dim, narrow)]
    wide = linear(narrow or dim, 4 * dim)
    return nn.Sequential(
        *first, Dropout(dropout), wide, nn.GELU(), Dropout(dropout), linear(4 * dim, dim), Dropout(dropout)
    )


def threshold(distances: Tensor, p: float) -> Tensor:
    """The smallest of the k = int(n(1 − p)) largest of n distances, but of one at least; a scalar."""
    k = max(1, int(distances.numel() * (1 - p)))
    return distances.flatten().topk(k).values[-1]


class Dinomaly(GroupedReconstruction):
    """Dinomaly.

    Args:
        variants: for each variant `dropout` of the bottleneck; `narrow`, the width of a first linear layer, or None;
            `first_lr`, the learning rate of the first layer, or None; `recentre`, whether the targets are layer norms
            of patch tokens minus the class token; `eps` in the attention's denominator; `final` (see
            GroupedReconstruction); `optimizer`, options that override the configured ones; `skip: false`
            is left out, because only StableAdamW has this option.
        variant: which of them: v1 is Dinomaly, v2 Dinomaly2.
        mining: {share, factor, warm_up}: the gradient is multiplied by `factor` at the `share` of positions with the
            smallest distances; the share rises from 0 over `warm_up` steps. None: no mining.
    """

    uses_tokens = True

    def __init__(
        self,
        variants: dict[str, dict[str, Any]],
        variant: str = "v1",
        mining: dict[str, float] | None = None,
        **context: Any,
    ):
        if variant not in variants:
            raise UserError(f"method.variant={variant}: choose {' or '.join(variants)}")
        own = variants[variant]
        used = {key: value for key, value in own["optimizer"].items() if (key, value) != ("skip", False)}
        self.own, self.variants = own | {"optimizer": used}, tuple(variants)
        super().__init__(final=self.own["final"], **context)
        self.variant, self.mining = variant, mining
        self.check()
        self.bottleneck = bottleneck(self.dim, self.own["dropout"], self.own["narrow"])
        self.decoder = nn.ModuleList(Block(self.dim, self.heads, self.own["eps"]) for _ in range(self.blocks))

    def check(self) -> None:
        """Raise UserError for values that fit no training, or a backbone without the class token that v2 needs."""
        assert self.backbone is not None
        if not 0 <= self.own["dropout"] < 1:
            raise UserError(f"method.variants.{self.variant}.dropout={self.own['dropout']}: give 0 or more, below 1")
        if self.mining is not None and not (
            0 <= self.mining["share"] < 1 and self.mining["factor"] >= 0 and self.mining["warm_up"] >= 1
        ):
            raise UserError(
                f"method.mining={self.mining}: give null, or a share from 0, below 1, a factor from 0, a warm_up from 1"
            )
        if self.own["recentre"] and not getattr(self.backbone, "class_token", False):
            raise UserError(
                f"method.variants.{self.variant}.recentre=true: the class token is subtracted from the targets, and "
                f"{self.backbone.name} has none; give false, or a ViT that has one (backbone=dinov2_small)"
            )

    def without_effect(self) -> dict[str, str]:
        unused, chosen = (
            unused_by_variant(self.variants, self.variant, self.own["optimizer"]),
            f"variants.{self.variant}",
        )
        if self.own["narrow"] is None:
            unused[f"{chosen}.first_lr"] = f"method.{chosen}.narrow=null"
        if self.scheduler is not None:
            unused[f"{chosen}.final"] = "method.scheduler"
        return super().without_effect() | unused

    def reconstructed(self, tokens: Tensor) -> tuple[list[Tensor], float]:
        x, outputs = self.bottleneck(tokens).to(tokens.dtype), []  # the residual sums of all blocks stay in float32
        for block in self.decoder:
            x = block(x)
            outputs.append(x)
        return outputs, 0.0

    def targets(self, patches: list[Tensor], prefixes: list[Tensor]) -> list[Tensor]:
        """Dinomaly2: LN(patch − class token), without affine; Dinomaly: the patches."""
        if not self.own["recentre"]:
            return patches
        return [
            F.layer_norm(x - tokens[:, :1], x.shape[-1:], eps=1e-8) for x, tokens in zip(patches, prefixes, strict=True)
        ]

    def gradient_scale(self, distances: Tensor) -> Tensor | None:
        if self.mining is None:
            return None
        share, warm_up = self.mining["share"], int(self.mining["warm_up"])
        p = min(share * self.trainer.global_step / warm_up, share)
        return torch.ones_like(distances).masked_fill(distances < threshold(distances, p), self.mining["factor"])

    def parameter_groups(self) -> list[Any]:
        first = list(self.bottleneck[0].parameters()) if self.own["narrow"] else []
        rest = [p for p in super().parameter_groups() if all(p is not other for other in first)]
        if not first or self.own["first_lr"] is None:
            return [{"params": [*first, *rest]}]
        return [{"params": rest}, {"params": first, "lr": self.own["first_lr"]}]

    def make_optimizer(self, parameters: list[Any], **options: Any) -> torch.optim.Optimizer | None:
        return super().make_optimizer(parameters, **self.own["optimizer"] | options)
