"""The network of the self-supervised autoencoder, whose details `ssae` explains: dilated, with convex combinations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = (1, 2, 4, 8, 16, 32)
MARGIN = 8  # pixels
SKIPS = ("none", "concat", "ccm")


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
