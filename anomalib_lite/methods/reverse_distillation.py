"""Bottleneck and decoder of reverse distillation (RD4AD, Deng and Li, arXiv 2201.10703), for any three levels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.batch_norm import Norm


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps or halves the size, then batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), Norm(outputs))


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Transposed convolution that doubles the size, then batch norm."""
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False), Norm(outputs))


def in_place(activation: type) -> nn.Module:
    """An activation that overwrites its input where the backward pass allows it, that is ReLU."""
    return activation(inplace=True) if activation is nn.ReLU else activation()


class Residual(nn.Module):
    """A ResNet block: a bottleneck block (1×1, 3×3, 1×1) of inner `width`, or with None a basic block (3×3, 3×3).

    `change` "down" halves the size with a stride in the first 3×3 convolution, "up" doubles it with a transposed
    convolution in its place. The shortcut is then a strided 1×1 or a transposed convolution, with batch norm.
    """

    def __init__(self, inputs: int, outputs: int, width: int | None, change: str = "", activation: type = nn.ReLU):
        super().__init__()

        def middle(a: int, b: int) -> nn.Sequential:
            return double(a, b) if change == "up" else conv(a, b, 3, 2 if change == "down" else 1)

        if width is None:
            self.body = nn.Sequential(middle(inputs, outputs), in_place(activation), conv(outputs, outputs, 3))
        else:
            inner = middle(width, width)
            self.body = nn.Sequential(
                conv(inputs, width, 1), in_place(activation), inner, in_place(activation), conv(width, outputs, 1)
            )
        self.shortcut: nn.Module = nn.Identity()
        if change:
            self.shortcut = double(inputs, outputs) if change == "up" else conv(inputs, outputs, 1, 2)
        self.activation = in_place(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def stage(
    count: int, inputs: int, outputs: int, ratio: float | None, change: str, activation: type = nn.ReLU
) -> nn.Sequential:
    """A stage of `count` blocks; the first block changes size and channels."""
    width = None if ratio is None else int(outputs * ratio)
    blocks = [Residual(inputs, outputs, width, change, activation)]
    blocks += [Residual(outputs, outputs, width, "", activation) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def blocks_of(backbone: Backbone) -> tuple[float | None, list[int]]:
    """(inner width / outputs of bottleneck blocks, or None for basic blocks; number of blocks of each level).

    The values are those of the backbone if it is a ResNet; other backbones get two basic blocks per level.
    """
    modules = dict(backbone.net.named_modules())
    stages = [modules.get(name) for name in backbone.net.feature_info.module_name()]
    firsts = [found[0] if isinstance(found, nn.Sequential) and len(found) else None for found in stages]
    if {type(block).__name__ for block in firsts} == {"Bottleneck"}:
        last: nn.Module = firsts[-1]  # type: ignore[assignment]
        return last.conv2.out_channels / last.conv3.out_channels, [len(x) for x in stages]  # type: ignore
    if {type(block).__name__ for block in firsts} == {"BasicBlock"}:
        return None, [len(x) for x in stages]  # type: ignore[arg-type]
    return None, [2] * len(stages)


class Bottleneck(nn.Module):
    """Three levels [B, C_k, H_k, W_k], each half as large as the one before -> [B, 2·C_3, H_3/2, W_3/2].

    Two strided convolutions bring level 1 to level 3's size, one brings level 2 to it. The concatenated levels pass
    through residual blocks; the first block has a stride.
    """

    def __init__(self, channels: Sequence[int], count: int, ratio: float | None):
        super().__init__()
        c1, c2, c3 = channels
        relu = nn.ReLU(inplace=True)
        self.first = nn.Sequential(conv(c1, c2, 3, 2), relu, conv(c2, c3, 3, 2), relu)
        self.second = nn.Sequential(conv(c2, c3, 3, 2), relu)
        self.blocks = stage(count, 3 * c3, 2 * c3, ratio, "down")
        initialise(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return self.blocks(torch.cat([self.first(levels[0]), self.second(levels[1]), levels[2]], 1))


class Decoder(nn.Module):
    """The encoder's mirror: the bottleneck's output -> levels like the encoder's, in the encoder's order."""

    def __init__(self, channels: Sequence[int], counts: Sequence[int], ratio: float | None, activation: type = nn.ReLU):
        super().__init__()
        inputs = [2 * channels[2], channels[2], channels[1]]
        self.stages = nn.ModuleList(
            stage(count, wide, narrow, ratio, "up", activation)
            for count, wide, narrow in zip(counts, inputs, reversed(channels), strict=True)
        )
        initialise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            levels.insert(0, x)
        return levels


def initialise(module: nn.Module) -> None:
    """Initialise convolutions with kaiming-normal (fan_out); transposed convolutions keep torch's default."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def check_levels(backbone: Backbone | None, image_size: Sequence[int]) -> Backbone:
    """Raise UserError unless there are three levels, each half the size of the one before, the last of even size."""
    if backbone is None:
        raise UserError("backbone=none: this method needs a backbone; give one, such as backbone=wide_resnet50_2")
    steps = [b / a for a, b in zip(backbone.reductions, backbone.reductions[1:], strict=False)]
    if steps != [2, 2]:
        raise UserError(
            f"backbone.layers={backbone.layers}: give three levels, each half as large as the one before; these levels "
            f"of {backbone.name} are 1/{', 1/'.join(map(str, backbone.reductions))} of the image"
        )
    multiple = 2 * backbone.reductions[-1]
    if any(side % multiple for side in image_size):
        shown = "×".join(map(str, image_size))
        raise UserError(f"data.image_size={shown}: with this backbone's levels, give multiples of {multiple}")
    expected = [tuple(side // r for side in image_size) for r in backbone.reductions]
    if (grids := backbone.grids.get((image_size[0], image_size[1]), expected)) != expected:
        raise UserError(
            f"backbone.name={backbone.name}: its levels have the sizes {grids}, not {expected} as this method needs; "
            "give another backbone"
        )
    return backbone
