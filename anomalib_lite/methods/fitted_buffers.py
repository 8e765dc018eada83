"""Buffers whose shapes are known only after fitting."""

from typing import Any

import torch
from torch import Tensor, nn


def make_room(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    """Give buffers the shapes and types of a checkpoint's state before it is loaded: a hook of `load_state_dict`."""
    for name, buffer in list(module.named_buffers()):
        stored = state.get(f"{prefix}{name}")
        if stored is not None and (stored.shape, stored.dtype) != (buffer.shape, buffer.dtype):
            owner, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(owner), own_name, torch.empty_like(stored, device=buffer.device))
