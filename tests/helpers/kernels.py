"""Kernels and waits of a training step on a GPU, counted without one on PyTorch's fake tensors.

Every operation that the dispatcher sees below autograd counts as one kernel unless it only makes a view or reserves
memory; a convolution's backward pass counts as one per gradient. So the numbers are comparable with each other, and a
lower limit of what a profiler shows.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.fake_cuda import fake_cuda

#: operations that launch nothing
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
}
#: operations whose result the host waits for
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


@dataclass
class Kernels(TorchDispatchMode):
    """Counts operations on tensors of the GPU by their names, and those that wait for the GPU."""

    launched: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        before, after = (
            {x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in ((args, kwargs), out)
        )
        if "cuda" in before and (name in WAITS or (name in ("_to_copy", "copy_") and "cpu" in after)):
            self.waits[name] += 1
        elif "cuda" in before | after and name not in FREE and not func.is_view and func.namespace == "aten":
            self.launched[name] += sum(args[-1]) if name == "convolution_backward" else 1
        return out


def fused_attention(q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention as a GPU computes it: one kernel after the mask has become a bias."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(q.dtype).expand(*q.shape[:3], k.shape[2])
    wants = any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, wants, dropout)[0]


def backward(loss: Tensor) -> None:
    """loss.backward() without PyTorch's engine, which needs a driver: every node of the graph is called here."""
    pending: dict[Any, list[Any]] = {loss.grad_fn: [torch.ones_like(loss)]}
    while open_nodes := [node for node in pending if not hasattr(node, "variable")]:
        node = max(open_nodes, key=lambda node: node._sequence_nr())  # the last one of the forward pass
        found = node(*pending.pop(node))
        for (following, at), grad in zip(
            node.next_functions, found if isinstance(found, tuple) else (found,), strict=True
        ):
            if following is None or grad is None:
                continue
            slots = pending.setdefault(following, [None] * len(following._input_metadata))
            grad = grad.sum_to_size(following._input_metadata[at].shape)  # as the engine does where one was broadcast
            slots[at] = grad if slots[at] is None else slots[at] + grad
    for leaf, (grad,) in pending.items():
        leaf.variable.grad = grad


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """`fake_cuda`, with one kernel for attention."""
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", fused_attention)
        yield


def step_kernels(model: Any, batch: dict[str, Any]) -> dict[str, Kernels]:
    """Kernels of a training step's forward pass, backward pass and optimizer; to be called inside `fake_gpu`."""
    parts = {name: Kernels() for name in ("forward", "backward", "optimizer")}
    optimizer = model.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    with parts["forward"]:
        loss = model.training_step(batch, 0)
    with parts["backward"]:
        backward(loss)
    with parts["optimizer"]:
        if model.clip is not None:  # clip_grad_norm_ as it runs on real tensors of a GPU
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, (model.clip / (total + 1e-6)).clamp(max=1.0))
        optimizer.step()
    # the optimizer's state of the first step, and copies that only the fake kernel of _foreach_mul_ makes
    parts["optimizer"].launched -= Counter(zeros=2**40, zeros_like=2**40, clone=2**40)
    return parts
