"""Buffers whose shapes are known only after fitting."""

from typing import Any

import torch
from torch import Tensor, nn


def register_fitted(module: nn.Module, **buffers: Tensor) -> None:
    """Register buffers that get other shapes in fitting; loading a checkpoint gives them its shapes."""
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)

    def make_room(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in buffers:
            if (stored := state.get(f"{prefix}{name}")) is not None:
                setattr(module, name, torch.empty_like(stored, device=getattr(module, name).device))

    module.register_load_state_dict_pre_hook(make_room)
