"""UniAD: a unified model for multi-class anomaly detection (You et al., NeurIPS 2022, arXiv 2206.03687).

All levels of a frozen backbone, resized to the coarsest grid, are reconstructed by a transformer that can't copy: no
token sees its neighbours, the decoder starts from learned queries, and training features are jittered.

With equal weights, networks, loss and gradients equal the authors'. Two things differ. Their backbone has a static
padding that was made for images of 380²: it samples levels 2 and 3 one cell further up and to the left than timm does.
Their learning rate drops one epoch later than ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.options import check_clip, check_counts, check_drop, check_dropout, check_from_0
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.schedules import with_drop
from anomalib_lite.methods.transformer import ReconstructionTransformer, jitter, largest_window, token_grids


class UniAD(AnomalyModule):
    """UniAD's transformer reconstructs features; the norm of a token's error is its score.

    Args:
        dim, layers (of encoder and decoder each), heads, hidden (of the feed-forward networks), dropout: transformer.
        neighbours: side of the masked neighbourhood, odd; None is no mask.
        jitter: scale of the features' noise in training.
        clip: largest norm of a step's gradient; None is no limit.
        drop: {at, factor}: after the share `at` of the budget the learning rate is multiplied by `factor`; None: never.
    """

    frozen_features = True
    uses_images = False
    keeps = "levels on the last one's grid"

    def __init__(
        self,
        dim: int = 256,
        layers: int = 4,
        heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.1,
        neighbours: int | None = 7,
        jitter: float = 20.0,
        clip: float | None = 0.1,
        drop: dict[str, float] | None = None,
        **context: Any,
    ):
        super().__init__(**context)
        assert self.backbone is not None
        self.grid = token_grids(self)[-1]
        if neighbours is not None and (neighbours < 1 or neighbours % 2 == 0 or neighbours > largest_window(self.grid)):
            raise UserError(
                f"method.neighbours={neighbours}: give null, or an odd number from 1 to {largest_window(self.grid)}, "
                f"so that each of the {self.grid[0]}×{self.grid[1]} tokens has others to attend to"
            )
        check_counts(dim=dim, layers=layers, heads=heads, hidden=hidden)
        if dim % heads or dim % 2:
            raise UserError(f"method.dim={dim}: give an even number that is a multiple of method.heads={heads}")
        check_dropout(dropout)
        check_from_0(jitter=jitter)
        check_clip(clip)
        self.jitter, self.clip, self.drop = jitter, clip, drop
        channels = sum(self.backbone.channels)
        self.net = ReconstructionTransformer(channels, self.grid, dim, layers, heads, hidden, dropout, neighbours)

    def check_training(self) -> None:
        check_drop("method.drop", self.drop)

    def networks(self) -> list[nn.Module]:
        return [self.net]

    def without_effect(self) -> dict[str, str]:
        return {"drop": "method.scheduler"} if self.scheduler else {}

    def kept(self, levels: list[Tensor]) -> list[Tensor]:
        """All levels, resized to the last one's grid and concatenated, [B, ΣC, H, W]; then further outputs as they are.

        Stored features of published sizes take a ninth of what the levels would take.
        """
        count = len(self.backbone.channels)  # type: ignore[union-attr]
        maps = [resize(x, self.grid, align_corners=True) for x in levels[:count]]
        return [torch.cat(maps, 1), *levels[count:]]

    def joined_tokens(self, batch: Batch) -> Tensor:
        """Clean tokens [B, L, ΣC] of a batch."""
        return tokens_of(self.features(batch)[0])

    def reconstructed(self, tokens: Tensor) -> Tensor:
        with self.autocast():
            return self.net(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean squared error between clean tokens and the reconstruction of jittered ones."""
        tokens = self.joined_tokens(batch)
        return F.mse_loss(self.reconstructed(jitter(tokens, self.jitter)), tokens)

    def held_out_loss(self, batch: Batch) -> Tensor:
        tokens = self.joined_tokens(batch)
        return (self.reconstructed(tokens) - tokens).square().mean((1, 2))

    def anomaly_map(self, batch: Batch) -> Tensor:
        tokens = self.joined_tokens(batch)
        errors = torch.linalg.vector_norm(self.reconstructed(tokens) - tokens, dim=-1).unflatten(1, self.grid)
        return resize(errors[:, None], self.image_size, align_corners=True)[:, 0]

    def configure_optimizers(self) -> Any:
        optimizer, drop = super().configure_optimizers(), self.drop
        if drop is None or not isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        return with_drop(optimizer, drop, self.total_steps)


def tokens_of(joined: Tensor) -> Tensor:
    """A map [B, C, H, W] as tokens [B, H·W, C]."""
    return joined.flatten(2).mT.contiguous()
