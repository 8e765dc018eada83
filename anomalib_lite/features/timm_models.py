"""Models from timm that give feature maps of the run's image size, and the loading of their weights."""

import contextlib
import difflib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_lite.errors import NO_MEMORY, UserError
from anomalib_lite.features.hub import hub_or_cache, line_of
from anomalib_lite.features.transformers import NormedGetter
from anomalib_lite.features.weights import lenient_load, read_weights

Size = tuple[int, int]  # (H, W)
SOURCES = ("hf_hub:", "hf-hub:", "local-dir:")  # names with a config.json of their own, on the hub or in a folder
#: Options for a model whose own image size is fixed: positions that are resampled in every forward pass (Swin in older
#: versions of timm: the second), or positions and windows for one size.
FOR_OTHER_SIZES = ("dynamic_img_size", "strict_img_size", "img_size")


class SizeError(Exception):
    """The model can't take images of this size; the text is the model's reason."""


def feature_maps(net: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """The outputs of a timm model. Raise SizeError if it can't take this image size."""
    try:
        return list(net(images))
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # timm has no common class for it
        if NO_MEMORY.search(f"{type(error).__name__} {error}"):
            raise
        raise SizeError(line_of(error).rstrip(".")) from error


def create_for_sizes(
    name: str, layers: list[int], weights: str, sizes: Sequence[Size], norm: bool = False
) -> tuple[Any, list[bool], dict[Size, list[Size]]]:
    """A model for images of these sizes, tested with one image of each size.

    A model that takes only its own image size is built for these sizes; its positions are resampled. With `norm`, a
    transformer's final norm is applied to the output of every chosen block.

    Returns:
        (model, for each layer whether its output has channels last, {size: (H_i, W_i) of each layer's map}).

    Raises:
        UserError: see `create`; the model can't take a size; an output is no feature map.
    """
    normed = {"feature_cls": NormedGetter} if norm else {}
    net = create(name, layers, weights, **normed)
    own = tuple((net.pretrained_cfg.get("input_size") or (3, 224, 224))[-2:])
    fixed = bool(net.pretrained_cfg.get("fixed_input_size"))
    sizes = list(sizes) or [own if fixed else (128, 128)]
    try:
        return net, *_tested(net, name, sizes)
    except SizeError as error:
        reason, size = str(error), next(size for size in sizes if not _takes(net, name, size))
    flexible = None
    for option in FOR_OTHER_SIZES:
        value = {"dynamic_img_size": True, "strict_img_size": False, "img_size": sizes[0]}[option]
        try:
            net = create(name, layers, weights, **{option: value}, **normed)
            return net, *_tested(net, name, sizes, whole=True)
        except (SizeError, TypeError) as error:  # TypeError: the model has no such option
            if isinstance(error, SizeError) and option != "img_size":
                reason, flexible = str(error), net
    multiple = math.lcm(*net.feature_info.reduction())
    whole = [tuple(max(1, rounded(n / multiple)) * multiple for n in size) for rounded in (math.floor, math.ceil)]
    near = [(h, w) for h, w in whole if flexible is not None and (h, w) != size and _takes(flexible, name, (h, w))]
    give = " or ".join(_shown(other) for other in near or [own])
    raise UserError(f"data.image_size={_shown(size)}: {name} can't take this size ({reason}); give {give}")


def _shown(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def _takes(net: nn.Module, name: str, size: Size) -> bool:
    with contextlib.suppress(SizeError):
        return bool(_tested(net, name, [size], whole=True))
    return False


@torch.no_grad()
def _tested(
    net: Any, name: str, sizes: Sequence[Size], whole: bool = False
) -> tuple[list[bool], dict[Size, list[Size]]]:
    """Whether each output has channels last, and the maps' sizes.

    Raises:
        SizeError: the model can't take a size, or (with `whole`) its maps leave out a part of the image.
        UserError: an output is no map with the channels that the model announces.
    """
    net.eval()
    last = [False] * len(net.feature_info.channels())
    grids: dict[Size, list[Size]] = {}
    for size in sizes:
        maps = feature_maps(net, torch.zeros(1, 3, *size))
        grids[size] = []
        for i, (x, channels, reduction) in enumerate(
            zip(maps, net.feature_info.channels(), net.feature_info.reduction(), strict=True)
        ):
            expected = (-(-size[0] // reduction), -(-size[1] // reduction))
            if x.dim() != 4 or channels not in (x.shape[1], x.shape[3]):
                raise UserError(
                    f"backbone.name={name}: output {i} of its layers has the shape {[*x.shape]}, not {channels} "
                    f"channels at {expected[0]}×{expected[1]}; choose other layers or another model"
                )
            last[i] = _channels_last(net, x, channels, expected)
            height, width = x.shape[1:3] if last[i] else x.shape[2:]
            grids[size].append((height, width))
            if whole and (height * reduction, width * reduction) != size:
                raise SizeError(f"no multiple of {math.lcm(*net.feature_info.reduction())}")
    return last, grids


def _channels_last(net: Any, x: Tensor, channels: int, expected: Size) -> bool:
    """By the shape [1, a, b, c]; where a and c are both equal to the channels, by timm's own statement."""
    if x.shape[1] != x.shape[3]:
        return x.shape[3] == channels and (x.shape[1] != channels or tuple(x.shape[1:3]) == expected)
    return getattr(getattr(net, "output_fmt", None), "value", "NCHW") == "NHWC"


def create(name: str, layers: list[int], weights: str, **options: Any) -> Any:
    """A timm model whose forward pass gives the chosen layers' maps; `options` go to its constructor.

    Raises:
        UserError: the model or a layer is unknown; the weights are missing, damaged or of another architecture;
            the model has no final norm for NormedGetter.
        TypeError: the model's constructor has no such option.
    """
    sourced, what = check_name(name), f"backbone.weights={weights}"
    overlay: dict[str, Any] = {}
    if weights not in ("auto", "none"):
        overlay = {"state_dict": read_weights(Path(weights).expanduser())}
    asks_hub = name.lower().startswith(SOURCES[:2]) or (weights == "auto" and not sourced)
    try:
        with lenient_load() as (missing, foreign), hub_or_cache() if asks_hub else contextlib.nullcontext():
            net = timm.create_model(
                name,
                pretrained=weights != "none",
                pretrained_cfg_overlay=overlay or None,
                features_only=True,
                out_indices=layers,
                **options,
            )
    except (TypeError, UserError):
        raise
    except Exception as error:  # without a network, hub clients raise exceptions of many classes
        if message := _explained(error, name, layers, weights):
            raise UserError(message) from error
        raise
    if overlay and foreign:
        raise UserError(f"{what}: these are not the weights of {name} ({foreign[0]} is not in it); give another file")
    lacking = [key for key, tensor in net.state_dict(keep_vars=True).items() if id(tensor) in missing]
    if lacking:
        raise UserError(
            f"{what}: the file lacks {len(lacking)} tensors that layers {layers} of {name} need, such as "
            f"{lacking[0]}; choose other layers or another file"
        )
    return net


def check_name(name: str) -> bool:
    """Whether the name has a source, the hub or a folder. Raise UserError if it has none and timm does not know it."""
    if name.lower().startswith(SOURCES):
        return True
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        if "/" in name or ":" in name:
            hint = "give hf_hub:OWNER/NAME for a model on the hub, or local-dir:FOLDER"
        raise UserError(f"backbone.name={name}: timm knows no such model; {hint}")
    return False


def normalisation(name: str) -> dict[str, list[float]]:
    """{"mean", "std"} of a model's training images in [0, 1], 3 numbers each.

    Raises:
        UserError: the model is unknown, or states no such numbers.
    """
    try:
        if check_name(name):
            source, _, place = name.partition(":")
            if source == "local-dir":
                about = json.loads((Path(place) / "config").with_suffix(".json").read_text())
                about = about.get("pretrained_cfg", about)
            else:
                with hub_or_cache():
                    about = timm.models.load_model_config_from_hf(place)[0]
        else:
            known = timm.get_pretrained_cfg(name)
            about = known.to_dict() if known else {}
        return {"mean": list(about["mean"]), "std": list(about["std"])}
    except UserError:
        raise
    except Exception as error:  # see `create`
        raise UserError(
            f"data.normalize=backbone: {name} states no mean and standard deviation ({line_of(error)}); give imagenet"
        ) from error


def _last_layer(name: str) -> int:
    """The highest index of a layer of the model."""
    asks_hub = name.lower().startswith(SOURCES[:2])
    with torch.device("meta"), hub_or_cache() if asks_hub else contextlib.nullcontext():
        net: Any = timm.create_model(name, features_only=True, out_indices=[0])
    return len(net.feature_info.info) - 1


def _explained(error: Exception, name: str, layers: list[int], weights: str) -> str | None:
    """The message for a user about an exception of timm or the hub's client; None for an unknown error."""
    text, what = str(error), f"backbone.weights={weights}"
    if isinstance(error, IndexError | AssertionError):
        return f"backbone.layers={layers}: {name} has the layers 0 to {_last_layer(name)}; choose from these"
    if isinstance(error, RuntimeError):
        if "Invalid pretrained tag" in text:
            known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
            return f"backbone.name={name}: timm knows no such weights; it has {known}"
        if "No pretrained weights exist" in text:
            return f"{what}: timm has no weights for {name}; choose a file, none, or another tag"
        if weights not in ("auto", "none") or "size mismatch" in text:
            return f"{what}: these are not the weights of {name} ({line_of(error, 1)}); give another file"
        if "feature" in text:
            return f"backbone.name={name}: no feature maps ({line_of(error)}); choose another"
        if "Unknown model" not in text:
            return None
    why = "it can't be reached" if type(error).__name__ == "LocalEntryNotFoundError" else line_of(error)
    if name.lower().startswith(SOURCES):
        return (
            f"backbone.name={name}: not found, or no model of timm ({why}); give a model's name on the hub, or a "
            "folder that holds config.json and the weights"
        )
    if weights != "auto":
        return None
    return (
        f"{what}: the weights of {name} were not found in the hub or its cache ({why}); give a local file, or none for "
        "random weights"
    )
