"""CUDA graphs: the kernels of a network's forward and backward pass are recorded once and then launched together."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from anomalib_lite.errors import UserError

KINDS = 2  # of inputs that are recorded, each in memory of its own: full batches and an epoch's last one


class Recorded:
    """Takes the place of a network's `forward` until `release`: in training it replays what earlier calls recorded.

    The kernels are PyTorch's own. A call runs kernel by kernel if it needs no gradient, if its inputs have other shapes
    than the first two kinds or are no tensors, or if it is a step's second call: each replay overwrites the outputs of
    the one before.

    Args:
        network: its inputs and outputs are tensors, or lists of tensors; it has no hooks.
        step: the number of the current training step.
    """

    def __init__(self, network: nn.Module, step: Callable[[], int]):
        self.network, self.step, self.plain = network, step, network.forward
        self.replays: dict[Any, Callable[..., Any]] = {}  # by the kind of inputs
        self.last = -1
        network.forward = self

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        given = pytree.tree_leaves((inputs, list(options.items())))
        tensors = all(isinstance(x, Tensor) for x in given)
        if not tensors or not torch.is_grad_enabled() or self.step() == self.last:
            return self.plain(*inputs, **options)
        self.last = self.step()
        kind = (self.network.training, *((x.shape, x.dtype, x.requires_grad) for x in given))
        if kind not in self.replays and len(self.replays) < KINDS:
            self.replays[kind] = self.record(inputs)
        return self.replays.get(kind, self.plain)(*inputs)

    def record(self, inputs: Any) -> Callable[..., Any]:
        """The function that replays both passes. Buffers and random numbers are afterwards as they were before."""
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        samples = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad), inputs)
        device = next(self.network.parameters()).device
        random = torch.cuda.get_rng_state(device)
        self.release()
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False), beside_other_threads():
            torch.cuda.make_graphed_callables(self.network, samples)
        replay = self.network.forward
        self.network.forward = self
        torch.cuda.set_rng_state(random, device)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return replay

    def release(self) -> None:
        """Give the network its own `forward` back."""
        self.network.__dict__.pop("forward", None)


@contextlib.contextmanager
def beside_other_threads() -> Iterator[None]:
    """Inside, recording allows CUDA calls of other threads, such as those that copy the next batch into pinned memory.

    make_graphed_callables has no argument for it, so the class that it uses is exchanged.
    """
    graph = torch.cuda.graph
    torch.cuda.graph = functools.partial(graph, capture_error_mode="thread_local")  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.cuda.graph = graph  # type: ignore[misc]


def check_devices(method: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Raise UserError if the options of a method and of its Trainer are those of a compiled method on several GPUs."""
    if method.get("compile") and trainer["accelerator"] == "gpu" and trainer["devices"] * trainer["num_nodes"] > 1:
        raise UserError("method.compile=true: CUDA graphs need hardware.devices=1; otherwise give false")


def start(method: Any) -> None:
    """Compile a method's `networks()` until `stop`: on a GPU as CUDA graphs, on a CPU by torch.compile.

    torch.compile draws other random numbers for dropout than PyTorch does.

    Raises:
        UserError: there is no compiler.
    """
    if method.device.type == "cuda":
        for network in method.networks():
            Recorded(network, lambda: method.global_step)
        return
    if method.device.type == "cpu" and shutil.which("g++") is None:
        raise UserError("method.compile=true: torch.compile needs the compiler g++; install it, or give false")
    for network in method.networks():
        network.compile()


def stop(method: Any) -> None:
    """The networks run kernel by kernel again: test has batches of other sizes. Gradients in a graph's memory go."""
    for network in method.networks():
        network._compiled_call_impl = None
        if isinstance(recorded := network.__dict__.get("forward"), Recorded):
            recorded.release()
            network.zero_grad(set_to_none=True)
