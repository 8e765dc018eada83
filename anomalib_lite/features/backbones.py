"""Feature extractors from timm, and the loading of their weights."""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.hub import hub_or_cache, line_of

log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Selected feature maps of a timm model: images [B, 3, H, W] -> list of [B, C_i, H_i, W_i], float32.

    The model is frozen and in evaluation mode until `unfreeze`. It runs in channels-last, and in `precision` if frozen.

    Args:
        name: any timm model with `features_only`, with the tag of its published weights (resnet18.tv_in1k).
        layers: timm's out_indices: which feature maps are selected.
        weights: "auto" (timm's weights from the hub or its cache), "none" (random), or a local file
            (safetensors, or a state dict that torch loads with weights_only).
        precision: "auto" (bf16 if the hardware supports it), "bf16" or "32".

    Raises:
        UserError: the model or a layer is unknown; the weights are missing, damaged or of another architecture.
            Pretrained weights are never silently replaced by random weights.
    """

    def __init__(self, name: str, layers: Sequence[int], weights: str = "auto", precision: str = "auto"):
        super().__init__()
        self.name, self.layers, self.weights, self.precision = name, list(layers), str(weights), str(precision)
        self.net = _build(name, self.layers, self.weights)
        self.channels: list[int] = list(self.net.feature_info.channels())
        self.reductions: list[int] = list(self.net.feature_info.reduction())
        self.frozen = True
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def unfreeze(self) -> "Backbone":
        """Make all weights trainable; from now on `train()` and `eval()` change the mode."""
        self.frozen = False
        return self.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(mode and not self.frozen)

    def low_precision(self, device: torch.device) -> bool:
        """Whether it runs in bf16 on this device: it must be frozen, and bf16 requested or native."""
        return self.frozen and (self.precision == "bf16" or (self.precision == "auto" and has_bf16(device)))

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        if not self.frozen:
            return self.net(images)
        low = self.low_precision(images.device)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            levels = self.net(images)
        return [level.float() for level in levels] if low else levels


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively, without emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # 2026-11: for CPUs, torch has no public function but this dictionary of flags; older versions lack it
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def _build(name: str, layers: list[int], weights: str) -> Any:
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise UserError(f"backbone.name={name}: timm knows no such model{hint}")
    overlay: dict[str, Any] = {}
    if weights not in ("auto", "none"):
        overlay = {"state_dict": _read_weights(Path(weights).expanduser())}
    what = f"backbone.weights={weights}"
    try:
        with _lenient_load() as (missing, foreign), hub_or_cache() if weights == "auto" else contextlib.nullcontext():
            net = timm.create_model(
                name,
                pretrained=weights != "none",
                pretrained_cfg_overlay=overlay or None,
                features_only=True,
                out_indices=layers,
            )
    except (IndexError, AssertionError) as error:
        raise UserError(f"backbone.layers={layers}: {name} has no such layer ({line_of(error)}); use others") from error
    except RuntimeError as error:
        if "Invalid pretrained tag" in str(error):
            known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
            raise UserError(f"backbone.name={name}: timm knows no such weights; it has {known}") from error
        if "No pretrained weights exist" in str(error):
            raise UserError(f"{what}: timm has no weights for {name}; choose a file, none, or another tag") from error
        if overlay or "size mismatch" in str(error):
            raise UserError(
                f"{what}: these are not the weights of {name} ({line_of(error, 1)}); give another file"
            ) from error
        if "feature" in str(error):
            raise UserError(f"backbone.name={name}: no feature maps ({line_of(error)}); choose another") from error
        raise
    except Exception as error:  # without a network, hub clients raise exceptions of many classes
        if weights != "auto":
            raise
        why = "it can't be reached" if type(error).__name__ == "LocalEntryNotFoundError" else line_of(error)
        raise UserError(
            f"{what}: the weights of {name} were not found in the hub or its cache ({why}); "
            "give a local file, or none for random weights"
        ) from error
    if overlay and foreign:
        raise UserError(f"{what}: these are not the weights of {name} ({foreign[0]} is not in it); give another file")
    lacking = [key for key, tensor in net.state_dict(keep_vars=True).items() if id(tensor) in missing]
    if lacking:
        raise UserError(
            f"{what}: the file lacks {len(lacking)} tensors that layers {layers} of {name} need, such as "
            f"{lacking[0]}; choose other layers or another file"
        )
    return net


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"backbone.weights={path}: no such file; give a weights file, auto, or none")
    try:
        return timm.models.load_state_dict(str(path))
    except Exception as error:
        raise UserError(f"backbone.weights={path}: damaged, or not a weights file ({line_of(error)})") from error


@contextlib.contextmanager
def _lenient_load() -> Iterator[tuple[set[int], list[str]]]:
    """Let timm load weights files that lack layers. Yields the ids of missing tensors and the names of surplus ones.

    timm loads strictly before it removes unused layers from the model, so it would refuse a file that lacks an unused
    layer. Removing layers keeps the tensor objects, so the ids show later which tensors the chosen layers miss.
    Surplus tensors outside the model's own parts (a classifier) are accepted. Surplus tensors inside them (layer1.2 of
    a resnet34 in a resnet18) are yielded: the file is of another architecture.
    """
    missing: set[int] = set()
    foreign: list[str] = []
    strict_load = nn.Module.load_state_dict

    def load(self: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        own = self.state_dict(keep_vars=True)
        found = strict_load(self, state_dict, strict=False, assign=assign)
        # `strict` is ignored: timm itself sets it to False for a model without its classifier.
        # Old files lack the counters of batches; a missing counter is accepted because nothing reads it.
        missing.update(id(own[key]) for key in found.missing_keys if not key.endswith("num_batches_tracked"))
        parts = {key.partition(".")[0] for key in own}
        foreign.extend(key for key in found.unexpected_keys if key.partition(".")[0] in parts)
        return found

    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    try:
        yield missing, foreign
    finally:
        nn.Module.load_state_dict = strict_load  # type: ignore[method-assign]
