"""Thin torchmetrics states over `functional`: they hold samples with their positions in the data set, nothing more.

The positions bring the samples back into the order of the data set and drop those that a sampler repeated, so batch
size, order and number of ranks change no bit. Pixels are gathered on rank 0 alone, batch by batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from anomalib_lite.metrics.functional import Metrics, image_metrics, pixel_metrics


class GatheredMetric(Metric):
    """Keeps every sample on the CPU and computes on rank 0.

    `compute` and `gathered` are collectives of the default process group: every rank must call them, also one that saw
    no sample. They need no group on one device, and work with gloo and NCCL. `forward` only updates.
    """

    full_state_update = False
    fields: ClassVar[dict[str, torch.dtype]]  # the states beside `index`, and the types that they are held in
    ndim: ClassVar[int]  # of a batch of any field
    index: list[Tensor]

    def __init__(self, ragged: bool = False) -> None:
        """`ragged`: samples may differ in shape; they are gathered as lists of arrays."""
        # no cache: a rank without new samples would answer from it while the others wait for that rank
        super().__init__(sync_on_compute=False, dist_sync_on_step=False, compute_with_cache=False)
        self.ragged = ragged
        for name in (*self.fields, "index"):
            self.add_state(name, default=[], dist_reduce_fx=None)

    def _metrics(self, data: dict[str, np.ndarray]) -> Metrics:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        return super()._apply(fn, (*exclude_state, *self.fields, "index"))  # moving the metric leaves them on the CPU

    def _append(self, index: Tensor, **batch: Tensor) -> None:
        held = getattr(self, next(iter(self.fields)))
        like = list(batch.values()) if self.ragged else held or list(batch.values())
        tail = like[0].shape[1:]  # the shape of one sample
        if any(x.ndim != self.ndim or x.shape != (*index.shape, *tail) for x in batch.values()):
            found = {name: tuple(x.shape) for name, x in {**batch, "index": index}.items()}
            raise ValueError(f"shapes don't fit each other or earlier batches (samples of {tuple(tail)}): {found}")
        if len(index):
            for name, x in batch.items():  # copies, so that a caller may use its tensors again
                getattr(self, name).append(x.detach().to("cpu", self.fields[name], copy=True).contiguous())
            self.index.append(index.detach().to("cpu", torch.int64, copy=True))

    def compute(self) -> Metrics:
        """The metrics of all samples of all ranks; the same answer, or ValueError as in `functional`, on every rank."""
        answer: list[Any] = [None]
        if (data := self.gathered()) is not None:
            try:
                answer[0] = self._metrics(data)
            except ValueError as error:  # the other ranks wait for an answer
                answer[0] = {"error": str(error)}
        if _world() > 1:
            dist.broadcast_object_list(answer, src=0, device=_device())
        if "error" in answer[0]:
            raise ValueError(answer[0]["error"])
        return answer[0]

    def gathered(self) -> dict[str, Any] | None:
        """On rank 0 the samples of all ranks by rising `index`, the first of each, as an array a field (a list of
        arrays where `ragged`); None on other ranks.

        Raises:
            ValueError: ranks hold samples of different shapes (on every rank).
        """
        held = getattr(self, next(iter(self.fields)))
        shapes = torch.tensor([x.shape for x in held], dtype=torch.int64).reshape(-1, self.ndim)
        positions = torch.cat([*self.index, shapes[:0, 0]])
        tail = held[0].shape[1:] if held and not self.ragged else (0,) * (self.ndim - 1)
        headers = _all_gather(torch.tensor([len(shapes), len(positions), *tail]))
        tails = {tuple(tail) for _, samples, *tail in headers if samples}
        if len(tails) > 1:
            raise ValueError(f"ranks hold samples of different shapes: {sorted(tails)}")
        if _world() > 1 and dist.get_rank() > 0:
            for x in (shapes, positions, *(x for name in self.fields for x in getattr(self, name))):
                _send(x)
            return None

        # all positions first: they say where in the result each sample goes, so the pixels need no second copy
        plans = [(shapes, positions)]
        for rank, (batches, samples, *_) in enumerate(headers[1:], start=1):
            plans.append((_receive((batches, self.ndim), torch.int64, rank), _receive((samples,), torch.int64, rank)))
        everything = torch.cat([positions for _, positions in plans])
        index, first = np.unique(everything.numpy(), return_index=True)
        row = torch.full_like(everything, -1)  # of each sample in the result, -1 for duplicates
        row[torch.from_numpy(first)] = torch.arange(len(index))
        data: dict[str, Any] = {}
        for name, dtype in self.fields.items():
            whole = torch.empty((len(index), *next(iter(tails), tail)), dtype=dtype)
            data[name] = [np.empty(0)] * len(index) if self.ragged else whole.numpy()
        for rank, rows in enumerate(row.split([len(positions) for _, positions in plans])):
            batch_shapes = [tuple(shape) for shape in plans[rank][0].tolist()]
            for name, dtype in self.fields.items():
                for i, to in enumerate(rows.split([shape[0] for shape in batch_shapes])):
                    batch = _receive(batch_shapes[i], dtype, rank) if rank else getattr(self, name)[i]
                    for sample, place in zip(batch.numpy(), to.tolist(), strict=True):
                        if place >= 0:
                            data[name][place] = sample
        return data | {"index": index}


class ImageMetrics(GatheredMetric):
    """`image_auroc`, `image_ap`, `image_f1max` of `functional.image_metrics`."""

    fields: ClassVar = {"scores": torch.float64, "labels": torch.int64}
    ndim = 1

    def update(self, scores: Tensor, labels: Tensor, index: Tensor) -> None:
        """Scores [B], labels [B] (0 or 1, integers or bool) and positions in the data set [B]."""
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers or bool, got {labels.dtype}")
        self._append(index, scores=scores, labels=labels)

    def _metrics(self, data: dict[str, np.ndarray]) -> Metrics:
        return image_metrics(data["scores"], data["labels"])


class PixelMetrics(GatheredMetric):
    """`pixel_auroc`, `pixel_ap`, `pixel_f1max`, `aupro_*` of `functional.pixel_metrics`; maps are held as float32."""

    fields: ClassVar = {"maps": torch.float32, "masks": torch.bool}
    ndim = 3

    def __init__(self, fpr_limits: Sequence[float] = (0.3, 0.05), ragged: bool = False) -> None:
        super().__init__(ragged)
        self.fpr_limits = tuple(fpr_limits)

    def update(self, maps: Tensor | list[Tensor], masks: Tensor | list[Tensor], index: Tensor) -> None:
        """Maps [B, H, W], masks [B, H, W] (any nonzero pixel is anomalous) and positions in the data set [B]; where
        `ragged`, lists of B maps and masks [H_i, W_i].
        """
        if isinstance(maps, Tensor) and isinstance(masks, Tensor):
            self._append(index, maps=maps, masks=masks != 0)
            return
        for i, (amap, mask, _) in enumerate(zip(maps, masks, index, strict=True)):
            self._append(index[i : i + 1], maps=amap[None], masks=mask[None] != 0)

    def _metrics(self, data: dict[str, np.ndarray]) -> Metrics:
        return pixel_metrics(data["maps"], data["masks"], self.fpr_limits)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    """Where the process group's tensors must lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _all_gather(x: Tensor) -> list[list[int]]:
    if _world() == 1:
        return [x.tolist()]
    x = x.to(_device())
    parts = [torch.empty_like(x) for _ in range(_world())]
    dist.all_gather(parts, x)
    return [part.tolist() for part in parts]


def _send(x: Tensor) -> None:
    if x.numel():
        dist.send((x.view(torch.uint8) if x.dtype == torch.bool else x).to(_device()), dst=0)
        if _device().type == "cuda":  # NCCL only queues: without a wait all batches would lie on the GPU at once
            torch.cuda.synchronize()


def _receive(shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
    x = torch.empty(tuple(shape), dtype=torch.uint8 if dtype == torch.bool else dtype, device=_device())
    if x.numel():
        dist.recv(x, src=rank)
    return x.cpu().view(dtype)
