"""Self-supervised autoencoder (Bauer, Nakajima, Müller, arXiv 2206.11723; Mathematics 12(24), 3988).

An autoencoder is trained to restore the clean image from a partly corrupted one, so that it acts as a projection onto
the normal manifold. The score is the squared error of one forward pass. `data.corrupt` corrupts the images. Gaussian
noise on top, which the target keeps, is of the authors' follow-up, whose σ we don't know. Details follow
re-implementations, since the paper's own were not available; our own choices are marked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.held_out import mean_loss
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.scoring import smooth

DILATIONS = (1, 2, 4, 8, 16, 32)
MARGIN = 8  # pixels
SKIPS = ("none", "concat", "ccm")
FLOOR = 0.2  # of the mean normal error; it bounds how much a place with hardly any error counts
CHANGED = 1.5 / 255  # |x̂ − x| > 1/255, between two 8-bit levels: 1/255 itself rounds either way in float32


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (or halves it), batch norm, LeakyReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.01, inplace=True),
    )


class DilatedStack(nn.Sequential):
    """Six residual blocks of growing dilation, [B, C, h, w] -> the same.

    Kernels wider than `side`, the positions of a training image, consist of their centre only (ours): the other weights
    would see almost only padding in training, and would add noise to larger images in test. For the same reason all
    weights except the centres start at 0 (ours).
    """

    def __init__(self, channels: int, side: int):
        super().__init__(*(conv(channels, channels, 3 if 2 * rate < side else 1, dilation=rate) for rate in DILATIONS))
        with torch.no_grad():
            for block in self:
                kernel = block[0].weight  # type: ignore[index]
                middle = kernel.shape[-1] // 2
                centre = kernel[..., middle, middle].clone()
                kernel.zero_()[..., middle, middle] = centre

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = x + block(x)
        return x


class ConvexCombination(nn.Module):
    """β ⊙ x_s + (1 − β) ⊙ x_d of the skip and the decoder, [B, C, h, w] each; β in (0, 1) is of that shape too.

    β comes from [x_s, x_d, (x_s − x_d)²] by two 1×1 convolutions (the kernel size is ours).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Sequential(conv(3 * channels, channels, kernel=1), nn.Conv2d(channels, channels, 1))

    def forward(self, skip: Tensor, decoder: Tensor) -> Tensor:
        beta = torch.sigmoid(self.beta(torch.cat([skip, decoder, (skip - decoder).square()], 1)))
        return decoder + beta * (skip - decoder)


class Joint(nn.Module):
    """Merges a decoder stage with the skip connection of its resolution: `none`, `concat`, or `ccm`."""

    def __init__(self, skip: str, channels: int):
        super().__init__()
        self.merge = ConvexCombination(channels) if skip == "ccm" else None
        self.concat = skip == "concat"
        self.conv = conv(2 * channels if self.concat else channels, channels)

    def forward(self, skip: Tensor, decoder: Tensor) -> Tensor:
        if self.merge is not None:
            decoder = self.merge(skip, decoder)
        return self.conv(torch.cat([skip, decoder], 1) if self.concat else decoder)


class Autoencoder(nn.Module):
    """[B, 3, H, W] -> [B, 3, H, W], for any size: fully convolutional; inside, sides are padded to multiples of 8.

    The image gets a mirrored margin (ours): next to zero padding reconstructions are bad, and the largest errors of
    normal images were in their corners.

    With `input_skip` (ours) the output is β ⊙ x + (1 − β) ⊙ y of the image x and the decoder's image y, β in (0, 1) for
    every pixel: the same convex combination as in the skip connections, so that unchanged parts are simply copied.

    Three stages halve the resolution to 1/2, 1/4 and 1/8, with `width`, 2 · `width` and 4 · `width` channels. `side` is
    the side of the training images, in pixels.
    """

    def __init__(self, width: int = 64, skip: str = "ccm", side: int = 256, input_skip: bool = False):
        super().__init__()
        self.input_skip = input_skip
        w1, w2, w3 = width, 2 * width, 4 * width
        self.down1 = nn.Sequential(conv(3, w1, stride=2), conv(w1, w1))
        self.down2 = nn.Sequential(conv(w1, w2, stride=2), conv(w2, w2))
        self.down3 = nn.Sequential(conv(w2, w3, stride=2), conv(w3, w3))
        self.bottleneck = DilatedStack(w3, (side + 2 * MARGIN) // 8)
        self.up2, self.join2 = conv(w3, w2), Joint(skip, w2)
        self.up1, self.join1 = conv(w2, w1), Joint(skip, w1)
        self.out = nn.Sequential(nn.Conv2d(w1, 16 if input_skip else 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        frame = (MARGIN, MARGIN + -width % 8, MARGIN, MARGIN + -height % 8)
        x = F.pad(x, frame, mode="reflect" if min(height, width) > max(frame) else "replicate")
        x = x.contiguous(memory_format=torch.channels_last)
        x1 = self.down1(x)
        x2 = self.down2(x1)
        y = self.bottleneck(self.down3(x2))
        y = self.join2(x2, self.up2(F.interpolate(y, scale_factor=2)))
        y = self.join1(x1, self.up1(F.interpolate(y, scale_factor=2)))
        with torch.autocast(y.device.type, enabled=False):  # bf16 would round the output to steps of up to 1/256
            y = self.out(y.float())
            if self.input_skip:
                y, beta = y[:, :3], torch.sigmoid(y[:, 3:])
                y = y + beta * (x.float() - y)
            return y[..., MARGIN : MARGIN + height, MARGIN : MARGIN + width]


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
        if noise < 0:
            raise UserError(f"method.noise={noise}: give a standard deviation from 0, in units of [0, 1]")
        for name, value in (
            ("width", width),
            ("eval_every", eval_every),
            ("patience", 1 if patience is None else patience),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"method.{name}={value}: give a whole number from 1")
        self.weight, self.patience, self.eval_every = corrupted_weight, patience, eval_every
        self.noise, self.calibrate = noise, calibrate
        side = min(self.image_size)
        self.net = Autoencoder(width, skip, side, input_skip).to(memory_format=torch.channels_last)
        self.register_buffer("best", torch.tensor(torch.inf, dtype=torch.float64))  # held-out loss
        self.register_buffer("waited", torch.tensor(0))  # evaluations since then
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.patience and self.global_step and self.global_step % self.eval_every == 0:
            self.look()
        if self.noise:
            noise = self.noise * torch.randn_like(batch["clean"])
            batch = batch | {"image": batch["image"] + noise, "clean": batch["clean"] + noise}
        return self.losses(batch).mean()

    def without_effect(self) -> dict[str, str]:
        return {"eval_every": "method.patience=null"} if self.patience is None else {}

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each image, [B]."""
        return losses(self.reconstruct(batch["image"]), batch["clean"], batch["image"], self.weight)

    def held_out_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)

    def look(self) -> None:
        """Compare the loss of held-out images, corrupted and clean ones, with the best one so far."""
        loss = mean_loss(self, self.held_out, self.losses)
        self.waited = torch.where(loss < self.best, 0, self.waited + 1)
        self.best = torch.minimum(loss, self.best)

    @property
    def stopped_early(self) -> bool:  # type: ignore[override]
        """Whether the current batch is the last one, because the held-out loss no longer falls."""
        return self.patience is not None and int(self.waited) >= self.patience

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
        return (self.reconstruct(batch["image"]) - batch["image"]).square().mean(1)

    def anomaly_map(self, batch: Batch) -> Tensor:
        errors = self.errors(batch)
        if not self.calibrate:
            return errors
        return errors / resize(self.normal_error[batch["category"], None], errors.shape[-2:])[:, 0]

    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruct(batch["image"]).clamp(0, 1)}
