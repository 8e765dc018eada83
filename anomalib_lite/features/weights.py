"""Weights files for timm's models, which may lack layers that a run does not use."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.hub import line_of


def read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"backbone.weights={path}: no such file; give a weights file, auto, or none")
    try:
        return timm.models.load_state_dict(str(path))
    except Exception as error:
        raise UserError(f"backbone.weights={path}: damaged, or not a weights file ({line_of(error)})") from error


@contextlib.contextmanager
def lenient_load() -> Iterator[tuple[set[int], list[str]]]:
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
