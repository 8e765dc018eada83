"""RD4AD: anomaly detection via reverse distillation from one-class embedding (Deng and Li, CVPR 2022,
arXiv 2201.10703).

The levels of a frozen encoder pass through a bottleneck, and a decoder, the encoder's mirror, reconstructs them.
Anomalies are where it fails.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.cosine import cosine, distance, products
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.reverse_distillation import Bottleneck, Decoder, blocks_of, check_levels


class RD4AD(AnomalyModule):
    """Reverse distillation on three levels, each half as large as the one before."""

    frozen_features = True
    uses_images = False

    def __init__(self, **context: Any):
        super().__init__(**context)
        backbone = check_levels(self.backbone, self.image_size)
        self.reduction = backbone.reductions[0]
        ratio, counts = blocks_of(backbone)
        self.bottleneck = Bottleneck(backbone.channels, counts[0], ratio)
        self.decoder = Decoder(backbone.channels, counts, ratio)

    def pairs(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The encoder's levels and their reconstructions, [B, C_k, H_k, W_k] each."""
        levels = self.features(batch)
        with self.autocast():
            return list(zip(levels, self.decoder(self.bottleneck(levels)), strict=True))

    def losses(self, batch: Batch) -> Tensor:
        """Sum over levels of 1 − cos(vec target, vec reconstruction), as in the authors' code, [B]."""
        sums = [[x.sum((1, 2)) for x in products(*pair)] for pair in self.pairs(batch)]
        return torch.stack([1 - cosine(*level) for level in sums]).sum(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        try:
            return self.losses(batch).mean()
        except ValueError as error:  # of torch's batch norm
            raise UserError(
                "data.batch_size: batch norm can't use a batch of one image whose last level is 1×1; give "
                "data.drop_last=true, or a larger data.image_size"
            ) from error

    def held_out_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)

    def anomaly_map(self, batch: Batch) -> Tensor:
        """Channel-wise cosine distances at the input's size, summed over levels (equations 1 and 3)."""
        maps = [distance(*pair)[:, None] for pair in self.pairs(batch)]
        size = [side * self.reduction for side in maps[0].shape[-2:]]
        return torch.cat([resize(x, size, align_corners=True) for x in maps], 1).sum(1)
