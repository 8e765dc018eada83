"""Self-supervised autoencoder (Bauer, Nakajima, Müller, arXiv 2206.11723; Mathematics 12(24), 3988).

An autoencoder is trained to restore the clean image from a partly corrupted one, so that it acts as a projection onto
the normal manifold. The score is the squared error of one forward pass. `data.corrupt` corrupts the images. Gaussian
noise on top, which the target keeps, is of the authors' follow-up, whose σ we don't know. Details follow
re-implementations, since the paper's own were not available; our own choices are marked.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.dilated_autoencoder import SKIPS, Autoencoder
from anomalib_lite.methods.held_out import mean_loss
from anomalib_lite.methods.options import check_counts, check_from_0
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.scoring import smooth
from anomalib_lite.methods.tiles import position_note

FLOOR = 0.2  # of the mean normal error; it bounds how much a place with hardly any error counts
CHANGED = 1.5 / 255  # |x̂ − x| > 1/255, between two 8-bit levels: 1/255 itself rounds either way in float32


def tone(x: Tensor, offset: float) -> Tensor:
    """log(1 + x / offset) of x in [0, 1], scaled to [0, 1]; x outside is clipped."""
    return torch.log1p(x.clamp(0, 1) / offset) / math.log1p(1 / offset)


def losses(output: Tensor, clean: Tensor, image: Tensor, weight: float) -> Tensor:
    """The loss of each image, [B]: mean squared error outside and inside of the corrupted part, weighted 1 − λ and λ.

    `output` f(x̂), `clean` x and `image` x̂ are [B, 3, H, W] in [0, 1]; `weight` is λ. M is where any channel of x̂ − x
    exceeds 1/255. A term whose mask is empty is 0.
    """
    inside = ((image - clean).abs() > CHANGED).any(1, keepdim=True).to(clean)
    error = (output - clean).square()

    def mean(mask: Tensor) -> Tensor:
        return (mask * error).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3))).clamp_min(1)

    return (1 - weight) * mean(1 - inside) + weight * mean(inside)


class SSAE(AnomalyModule):
    """The autoencoder, for images in [0, 1] (data.normalize=none) that `data.corrupt` corrupts.

    Args:
        width: channels of the first stage; 64 in the full size.
        skip: how the decoder uses the encoder at 1/2 and 1/4: "ccm" (convex combination), "concat" or "none".
        input_skip: whether the output is a convex combination of the image and the decoder's image (ours).
        corrupted_weight: λ, the share of the corrupted part in the loss.
        noise: σ of the Gaussian noise that is added to a training image and to its target, in units of [0, 1]. It pulls
            the reconstruction's Jacobian in clean parts towards the identity: the loss gains σ²‖J − I‖².
        log_offset: errors are differences of `tone` of image and reconstruction with this offset, in units of [0, 1]
            (ours): relative to the brightness, so that a defect in a dark part counts as much as in a bright one.
            Training is the same. None: differences of the images themselves.
        calibrate: errors are divided by the mean error of the normal training images at the same place (ours), of the
            same class if there are several. The mean is smoothed like maps; it counts by its own mean's FLOOR at least.
        patience: training ends early when the loss over held-out training images (data.val_fraction, half of them
            corrupted) has no new minimum in this many evaluations, one every `eval_every` batches. None: never.
    """

    uses_backbone = False
    best: Tensor
    waited: Tensor
    normal_error: Tensor

    def __init__(
        self,
        width: int = 64,
        skip: str = "ccm",
        input_skip: bool = False,
        corrupted_weight: float = 0.9,
        noise: float = 0.0,
        log_offset: float | None = None,
        calibrate: bool = False,
        patience: int | None = None,
        eval_every: int = 200,
        **context: Any,
    ):
        super().__init__(**context)
        if skip not in SKIPS:
            raise UserError(f"method.skip={skip}: choose {', '.join(SKIPS)}")
        if not 0 <= corrupted_weight <= 1:
            raise UserError(f"method.corrupted_weight={corrupted_weight}: give a share from 0 to 1")
        check_from_0(noise=noise)
        if log_offset is not None and log_offset <= 0:
            raise UserError(f"method.log_offset={log_offset}: give a number above 0, such as 0.1, or null")
        check_counts(width=width, eval_every=eval_every, patience=patience)
        self.weight, self.patience, self.eval_every = corrupted_weight, patience, eval_every
        self.noise, self.log_offset, self.calibrate = noise, log_offset, calibrate
        side = min(self.image_size)
        self.net = Autoencoder(width, skip, side, input_skip).to(memory_format=torch.channels_last)
        self.register_buffer("best", torch.tensor(torch.inf, dtype=torch.float64))  # held-out loss
        self.register_buffer("waited", torch.tensor(0))  # evaluations since then
        self.since_best = 0  # the same on the host: no step waits for the device
        if calibrate:
            self.register_buffer("normal_error", torch.ones(len(self.categories), *self.image_size))

    def reconstruct(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.net(images).float()

    def networks(self) -> list[nn.Module]:
        return [self.net]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.corrupt is None:
            raise UserError("data.corrupt=null: this method learns from corrupted images; see conf/method/ssae.yaml")
        if self.patience and not data.val_samples:
            raise UserError(
                "method.patience: needs held-out images; give data.val_fraction=0.1, or method.patience=null"
            )
        self.held_out = data.val_dataloader() if self.patience else []
        self.since_best = int(self.waited)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.patience and self.global_step and self.global_step % self.eval_every == 0:
            self.look()
        if self.noise:
            noise = self.noise * torch.randn_like(batch["clean"])
            batch = batch | {"image": batch["image"] + noise, "clean": batch["clean"] + noise}
        return self.losses(batch).mean()

    def without_effect(self) -> dict[str, str]:
        return {"eval_every": "method.patience=null"} if self.patience is None else {}

    def notes(self) -> list[str]:
        return position_note(self.tiling) if self.calibrate else []

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each image, [B]."""
        return losses(self.reconstruct(batch["image"]), batch["clean"], batch["image"], self.weight)

    def held_out_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)

    def look(self) -> None:
        """Compare the loss of held-out images, corrupted and clean ones, with the best one so far."""
        loss = mean_loss(self, self.held_out, self.losses)
        self.waited = torch.where(loss < self.best, 0, self.waited + 1)
        self.since_best = int(self.waited)
        self.best = torch.minimum(loss, self.best)

    @property
    def stopped_early(self) -> bool:  # type: ignore[override]
        """Whether the current batch is the last one, because the held-out loss no longer falls."""
        return self.patience is not None and self.since_best >= self.patience

    @torch.no_grad()
    def on_train_end(self) -> None:
        """With `calibrate`, the mean error of the training images, uncorrupted, at each place and of each class."""
        if not self.calibrate:
            return
        sums = torch.zeros_like(self.normal_error, dtype=torch.float64)
        counts = torch.zeros(len(self.categories), 1, 1, dtype=torch.float64, device=self.device)
        self.eval()
        for batch in self.train_eval_batches():
            errors = resize(self.errors(batch)[:, None], self.image_size)[:, 0].double()
            sums.index_add_(0, batch["category"], errors)
            counts.index_add_(0, batch["category"], torch.ones_like(errors[:, :1, :1]))
        self.train()
        mean = smooth((sums / counts).float(), self.scoring["pixel_smooth"])
        self.normal_error.copy_(mean + (FLOOR * mean.mean((1, 2), keepdim=True)).clamp_min(1e-12))

    def errors(self, batch: Batch) -> Tensor:
        """Squared error, mean over channels, [B, H, W]."""
        found, image = self.reconstruct(batch["image"]), batch["image"]
        if self.log_offset is not None:
            found, image = tone(found, self.log_offset), tone(image, self.log_offset)
        return (found - image).square().mean(1)

    def anomaly_map(self, batch: Batch) -> Tensor:
        errors = self.errors(batch)
        if not self.calibrate:
            return errors
        return errors / resize(self.normal_error[batch["category"], None], errors.shape[-2:])[:, 0]

    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruct(batch["image"]).clamp(0, 1)}
