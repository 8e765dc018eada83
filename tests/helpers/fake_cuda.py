"""Methods on a GPU that isn't there: PyTorch's fake tensors have devices and shapes, but no values.

An operation on tensors of different devices raises, as on a real GPU.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anomalib_lite.features.backbones import Backbone, renew_cast_net


class Answers(TorchDispatchMode):
    """Answers what can't be known without values: numbers are 1, conditions are false."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero"):
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Counts what a step costs a real GPU beside its work; enter it inside `fake_cuda`.

    Attributes:
        bytes_to_gpu: bytes of tensors that are copied from the host.
        waits: the number of operations for which the host waits, because it needs a value or a tensor of the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_to_gpu, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, on_gpu = func.__name__.split(".")[0], args and getattr(args[0], "is_cuda", False)
        out = func(*args, **(kwargs or {}))
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
            self.waits += bool(on_gpu)
        elif name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if out.is_cuda and not source.is_cuda:
                self.bytes_to_gpu += source.nbytes
            self.waits += source.is_cuda and not out.is_cuda
        return out


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake and `device="cuda"` works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
        patch.setattr("torch.cuda.current_device", lambda: 0)
        patch.setattr("torch.cuda.mem_get_info", lambda *_: (2**36, 2**36))
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        with FakeTensorMode(allow_non_fake_inputs=True), Answers():
            yield


def to_fake(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on the GPU; call it inside `fake_cuda`."""
    made: dict[int, Tensor] = {}

    def fake(x: Tensor | None) -> Tensor | None:
        if x is not None and id(x) not in made:
            y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            made[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
        return None if x is None else made[id(x)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(x) for name, x in tensors.items()})  # type: ignore[misc]
        if hasattr(part, "_device"):
            part._device = torch.device("cuda", 0)  # type: ignore[assignment]
        if isinstance(part, Backbone):
            renew_cast_net(part)


def fake_batch(count: int, side: int, first: int = 0) -> dict[str, Any]:
    """`count` images on the GPU with all keys of training and test."""
    numbers = {key: torch.zeros(count, dtype=torch.int64, device="cuda") for key in ("label", "category", "index")}
    mask = torch.zeros(count, side, side, dtype=torch.bool, device="cuda")
    images = {key: torch.randn(count, 3, side, side, device="cuda") for key in ("image", "clean")}
    return numbers | images | {"mask": mask, "path": [str(first + i) for i in range(count)]}


class FakeTrainer(SimpleNamespace):
    """What a method asks of the trainer and its data."""

    def __init__(self, categories: list[str], side: int):
        samples = [SimpleNamespace(path=str(i), category=categories[i % len(categories)], label=0) for i in range(7)]
        data = SimpleNamespace(
            train_samples=samples, fit_keys=lambda: samples, val_samples=[], corrupt=True, batches_per_epoch=100,
            balanced=False,
            training_batch=lambda indices, epoch: fake_batch(len(indices), side),
        )  # fmt: skip
        strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
        super().__init__(global_step=0, world_size=1, datamodule=data, strategy=strategy, callbacks=[])
