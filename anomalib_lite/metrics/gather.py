"""The evaluated images of all ranks, brought together on rank 0 in the data set's order.

Every sample carries its position in the data set. The positions restore the order and remove samples that a sampler
repeated, so batch size, order and number of ranks change no bit of a metric.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anomalib_lite.data.sampler import rank_and_world
from anomalib_lite.metrics.image_store import MEMORY, ImageStore

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
        folder: where images lie that do not fit into memory; see `ImageStore`.
    """

    def __init__(self, *fields: str, folder: Path | None = None) -> None:
        self.fields = fields
        self.positions: list[int] = []  # of the samples in the data set
        self.numbers = {name: list[float]() for name in fields if not FIELDS[name][1]}
        self.images = {name: ImageStore(_dtype(name), folder) for name in fields if FIELDS[name][1]}

    def update(self, index: Tensor, **batch: Tensor | list[Tensor]) -> None:
        """Add a batch: positions in the data set [B], and every field as a tensor [B] or [B, H, W], or as a list of B
        tensors where images differ in size. The tensors are copied.

        Raises:
            ValueError: a field has another number of samples or of dimensions.
            UserError: images do not fit into memory, and the disk is full.
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
            stored[name] = values.detach().to("cpu", dtype, copy=is_image and dtype != torch.bool).contiguous()
        if len(index):
            self.positions += index.tolist()
            for name, values in stored.items():
                self._add(name, values)

    def _add(self, name: str, values: Tensor) -> None:
        if name in self.numbers:
            self.numbers[name] += values.tolist()
            return
        self.images[name].limit = MEMORY // rank_and_world()[1]
        self.images[name].add(values.numpy())

    def gather(self) -> dict[str, Any] | None:
        """On rank 0, {field: values of all ranks' samples by rising position}: an array [N], for images a sequence of N
        arrays [H_i, W_i]; the values of a repeated position are those of its first sample. None on other ranks.

        This is a collective operation of the default process group: every rank must call it, also one without a sample.
        It needs no group on one device, and works with gloo and NCCL. Images are sent batch by batch to rank 0 alone,
        where they are stored once.
        """
        shapes = {name: [batch.shape for batch in store.batches] for name, store in self.images.items()}
        own = self.positions, self.numbers, shapes
        rank, world = rank_and_world()
        plans: list[Any] = [own] * world
        if world > 1:
            dist.all_gather_object(plans, own)
            if rank > 0:
                for store in self.images.values():
                    for number in range(len(store.batches)):
                        _send(torch.from_numpy(store.batch(number)))
                return None
        gathered = GatheredSamples(*self.fields)
        gathered.positions = [position for positions, _, _ in plans for position in positions]
        gathered.numbers = {name: [x for _, numbers, _ in plans for x in numbers[name]] for name in self.numbers}
        gathered.images = {name: store.extended() for name, store in self.images.items()}
        for source, (_, _, sent) in list(enumerate(plans))[1:]:
            for name in self.images:
                for shape in sent[name]:
                    gathered._add(name, _receive(shape, FIELDS[name][0], source))
        return gathered._in_order()

    def _in_order(self) -> dict[str, Any]:
        _, first = np.unique(np.array(self.positions, np.int64), return_index=True)
        values: dict[str, Any] = {name: np.array(self.numbers[name], _dtype(name))[first] for name in self.numbers}
        values |= {name: store.ordered(first.tolist()) for name, store in self.images.items()}
        return {name: values[name] for name in self.fields}


def _dtype(name: str) -> Any:
    return torch.empty(0, dtype=FIELDS[name][0]).numpy().dtype


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
