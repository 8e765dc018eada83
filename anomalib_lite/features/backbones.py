"""Frozen or trainable feature extractors from timm."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from anomalib_lite.errors import ImageSizeError
from anomalib_lite.features.timm_models import SizeError, create_for_sizes, feature_maps, normalisation
from anomalib_lite.features.transformers import maps_and_tokens, prefix_tokens

#: layers whose weights autocast casts as they are, unlike those of convolutions that standardise their weights
CAST = (nn.Conv2d, nn.Linear, Conv2dSame)


class Backbone(nn.Module):
    """Selected feature maps of a timm model: images [B, 3, H, W] -> list of [B, C_i, H_i, W_i], float32.

    The model is frozen and in evaluation mode until `unfreeze`. It runs in channels-last, and in `precision` if frozen.

    Args:
        name: any timm model with `features_only`, with the tag of its published weights (resnet18.tv_in1k);
            hf_hub:OWNER/NAME for a timm model on the Hugging Face hub, local-dir:FOLDER for one in a folder.
        layers: timm's out_indices: which feature maps are selected.
        weights: "auto" (timm's weights from the hub or its cache), "none" (random), or a local file
            (safetensors, or a state dict that torch loads with weights_only).
        precision: "auto" (bf16 if the hardware supports it), "bf16" or "32".
        image_sizes: the (H, W) of the images; a transformer with a fixed image size is built for the first one. Empty:
            the model's own size.
        norm: whether the model's final norm is applied to the output of every chosen block; transformers only.
        blocks: of a transformer, from which a configuration takes `layers` unless it says otherwise; not used here.
        tokens: whether `forward` also returns the class token and the register tokens, where the model has them.

    Attributes:
        channels, reductions: C_i, and H / H_i by timm's statement. grids: {(H, W) of images: (H_i, W_i) of the maps}.
        tokens: T, the number of class and register tokens of a level that `forward` returns. If T > 0, the L maps are
            followed by L token maps [B, C_i, 1, T], the class token first. The other attributes speak of the L maps.
        class_token: whether the model has a class token.

    Blocks of a transformer after the last chosen one are removed, so they cost nothing.

    Raises:
        UserError: the model or a layer is unknown; the weights are missing, damaged or of another architecture; the
            model can't take images of this size, or has no final norm. Pretrained weights are never silently replaced
            by random weights.
    """

    tokens: int = 0
    class_token: bool = False
    norm: bool = False
    casts_weights: bool = True  # on a GPU in bf16, once instead of in every pass
    cast_net: tuple[nn.Module, ...] = ()  # the model `in_half` on such a GPU; in a tuple it is no part of the state

    grids: dict[tuple[int, int], list[tuple[int, int]]]

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: str = "auto",
        precision: str = "auto",
        image_sizes: Sequence[Sequence[int]] = (),
        norm: bool = False,
        tokens: bool = False,
        blocks: Sequence[int] | None = None,
    ):
        super().__init__()
        self.name, self.layers, self.weights, self.precision = name, list(layers), str(weights), str(precision)
        self.norm = norm
        sizes = [(height, width) for height, width in image_sizes]
        self.net, self.channels_last, self.grids = create_for_sizes(name, self.layers, self.weights, sizes, norm)
        count, self.class_token = prefix_tokens(self.net)
        self.tokens = count if tokens else 0
        self.channels: list[int] = list(self.net.feature_info.channels())
        self.reductions: list[int] = list(self.net.feature_info.reduction())
        self.frozen = True
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.register_load_state_dict_post_hook(renew_cast_net)

    @classmethod
    def normalisation(cls, name: str) -> dict[str, Sequence[float]]:
        """{"mean", "std"} of the model's training images, for data.normalize=backbone; UserError if it states none."""
        return normalisation(name)  # type: ignore[return-value]

    def unfreeze(self) -> "Backbone":
        """Make all weights trainable; from now on `train()` and `eval()` change the mode."""
        self.frozen, self.cast_net = False, ()
        return self.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def low_precision(self, device: torch.device) -> bool:
        """Whether it runs in bf16 on this device: it must be frozen, and bf16 requested or native."""
        return self.frozen and (self.precision == "bf16" or (self.precision == "auto" and has_bf16(device)))

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        if not self.frozen:
            return self.maps(images)
        low = self.low_precision(images.device)
        net = self.cast_net[0] if low and self.cast_net else self.net
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            levels = self.maps(images, net)
        return [level.float() for level in levels] if low else levels

    def _apply(self, *args: Any, **kwargs: Any) -> "Backbone":
        super()._apply(*args, **kwargs)
        renew_cast_net(self)  # the weights have moved to another device
        return self

    def maps(self, images: Tensor, net: Any = None) -> list[Tensor]:
        """The outputs of the model, or of its copy `net`, as [B, C_i, H_i, W_i], and the token maps behind them.

        Some transformers (Swin) give [B, H_i, W_i, C_i].
        """
        size, net = tuple(images.shape[-2:]), net or self.net
        net = functools.partial(maps_and_tokens, net) if self.tokens else net
        if size in self.grids:
            levels = list(net(images))
        else:
            try:
                levels = feature_maps(net, images)
            except SizeError as error:
                raise ImageSizeError(
                    f"images of {size[0]}×{size[1]}: {self.name} can't take this size ({error}); give all images one "
                    "size (data.texture_size, data.transform)"
                ) from error
        turned = [x.movedim(-1, 1) if last else x for x, last in zip(levels, self.channels_last, strict=False)]
        return [*turned, *levels[len(turned) :]]


def renew_cast_net(backbone: Backbone, *_: Any) -> None:
    """Make `cast_net` from the weights where the model is frozen, on a GPU and computes in bf16."""
    first = next(backbone.parameters(), None)
    cast = first is not None and first.is_cuda and backbone.casts_weights and backbone.low_precision(first.device)
    backbone.cast_net = (in_half(backbone.net),) if cast else ()


@torch.no_grad()
def in_half(net: nn.Module) -> nn.Module:
    """A copy whose convolutions and linear layers hold bf16 weights: the numbers that autocast makes in every pass.

    Normalisations stay in float32.
    """
    half = copy.deepcopy(net)
    for part in half.modules():
        for name, parameter in part.named_parameters(recurse=False) if type(part) in CAST else ():
            setattr(part, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))
    return half


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively, without emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # 2026-11: for CPUs, torch has no public function but this dictionary of flags; older versions lack it
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
