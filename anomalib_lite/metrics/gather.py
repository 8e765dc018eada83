"""The evaluated images of all ranks, brought together on rank 0 in the data set's order.

Every sample carries its position in the data set. The positions restore the order and remove samples that a sampler
repeated, so batch size, order and number of ranks change no bit of a metric.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

#: what can be collected per image: the type in which it is stored, and whether it is an image [H, W] or a number
FIELDS: dict[str, tuple[torch.dtype, bool]] = {
    "scores": (torch.float64, False),
    "labels": (torch.int64, False),
    "map_max": (torch.float64, False),
    "map_median": (torch.float64, False),
    "maps": (torch.float32, True),
    "masks": (torch.bool, True),
}


class GatheredSamples:
    """Collects samples batch by batch on the CPU; `gather` brings those of all ranks to rank 0.

    Args:
        fields: names of FIELDS. Images may differ in size.
    """

    def __init__(self, *fields: str) -> None:
        self.fields = fields
        self.batches: list[tuple[list[int], dict[str, Tensor]]] = []  # positions, and {field: [B] or [B, H, W]}

    def update(self, index: Tensor, **batch: Tensor | list[Tensor]) -> None:
        """Add a batch: positions in the data set [B], and every field as a tensor [B] or [B, H, W], or as a list of B
        tensors where images differ in size. The tensors are copied.

        Raises:
            ValueError: a field has another number of samples or of dimensions.
        """
        if any(isinstance(values, list) for values in batch.values()):
            for i in range(len(index)):
                self.update(index[i : i + 1], **{name: values[i][None] for name, values in batch.items()})
            return
        stored: dict[str, Tensor] = {}
        for name in self.fields:
            (dtype, is_image), values = FIELDS[name], torch.as_tensor(batch[name])
            if len(values) != len(index) or values.ndim != (3 if is_image else 1):
                wanted = f"[{len(index)}, H, W]" if is_image else f"[{len(index)}]"
                raise ValueError(f"{name} of {len(index)} images must be {wanted}, got {list(values.shape)}")
            stored[name] = values.detach().to("cpu", dtype, copy=True).contiguous()
        if len(index):
            self.batches.append((index.tolist(), stored))

    def gather(self) -> dict[str, Any] | None:
        """On rank 0, {field: values of all ranks' samples by rising position}: an array [N], for images a list of N
        arrays [H_i, W_i]; the values of a repeated position are those of its first sample. None on other ranks.

        This is a collective operation of the default process group: every rank must call it, also one without a sample.
        It needs no group on one device, and works with gloo and NCCL. Images are sent batch by batch to rank 0 alone,
        where they are not copied again.
        """
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        own = [(index, {name: tuple(values.shape) for name, values in batch.items()}) for index, batch in self.batches]
        plans: list[Any] = [own] * ranks
        if ranks > 1:
            dist.all_gather_object(plans, own)
            if dist.get_rank() > 0:
                for _, batch in self.batches:
                    for values in batch.values():
                        _send(values)
                return None
        samples: dict[int, dict[str, Any]] = {}  # by position
        for rank, plan in enumerate(plans):
            for number, (index, shapes) in enumerate(plan):
                batch = self.batches[number][1] if rank == 0 else {}
                for name, shape in shapes.items() if rank else ():
                    batch[name] = _receive(shape, FIELDS[name][0], rank)
                arrays = {name: values.numpy() for name, values in batch.items()}
                for i, position in enumerate(index):
                    samples.setdefault(position, {name: array[i] for name, array in arrays.items()})
        gathered: dict[str, Any] = {}
        for name in self.fields:
            gathered[name] = [samples[position][name] for position in sorted(samples)]
            if not FIELDS[name][1]:
                gathered[name] = np.array(gathered[name], torch.empty(0, dtype=FIELDS[name][0]).numpy().dtype)
        return gathered


def _device() -> torch.device:
    """Where the process group's tensors must be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _send(values: Tensor) -> None:
    dist.send((values.view(torch.uint8) if values.dtype == torch.bool else values).to(_device()), dst=0)
    if _device().type == "cuda":  # NCCL only queues: without waiting, all batches would be on the GPU at once
        torch.cuda.synchronize()


def _receive(shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
    values = torch.empty(tuple(shape), dtype=torch.uint8 if dtype == torch.bool else dtype, device=_device())
    dist.recv(values, src=rank)
    return values.cpu().view(dtype)
