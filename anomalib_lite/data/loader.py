"""From a dataset to batches on this process's device: stored features come with the batch, training counts batches."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from anomalib_lite.cli import signals
from anomalib_lite.data.cores import threads
from anomalib_lite.data.dataset import AnomalyDataset, Batch, collate
from anomalib_lite.data.sampler import TrainBatchSampler
from anomalib_lite.data.stored_features import StoredFeatures

NUMBERS = ("index", "label", "category")
PICTURES = ("image", "clean")


class AnomalyLoader(DataLoader):
    """A loader that adds `features` to its batches where they are stored, and moves its training sampler on.

    `features` is a list of [B, H_i, W_i, C_i] in the type in which they are stored.

    With a GPU as `device`, numbers, images and features of a batch are there already. Images are copied as uint8 and
    normalised there. Features come from a table on the GPU, for which nothing but the batch's numbers is copied, or
    from pinned memory, which a thread fills one batch ahead.
    """

    def __init__(
        self,
        dataset: AnomalyDataset,
        stored: StoredFeatures | None = None,
        device: torch.device | None = None,
        workers: int = 0,
        seed: int = 0,
        persistent: bool = False,
        **options: Any,
    ):
        self.device = device if device and device.type != "cpu" else None
        dataset.normalises = self.device is None
        super().__init__(
            dataset,
            collate_fn=collate,
            worker_init_fn=one_thread,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=dataset.images and torch.cuda.is_initialized(),
            # Its own generator: each iteration draws a number, which must not move the global one that training uses.
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        self.rows = stored.rows_of(dataset) if stored else None

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """A generator: an iterator that nobody asks for a batch moves nothing on and starts no worker."""
        batches: Iterable[Any] = super().__iter__()
        if self.rows is not None and self.rows.on_device is None:
            gathered = map(self.with_rows, batches)
            batches = ahead(gathered) if self.device else gathered
        for batch in batches:
            if isinstance(self.batch_sampler, TrainBatchSampler):
                self.batch_sampler.next_batch += 1
            yield self.finished(batch)

    def batch_of(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, index), prepared in this process."""
        batch = collate([self.dataset[key] for key in keys])
        return self.finished(batch if self.rows is None or self.rows.on_device is not None else self.with_rows(batch))

    def with_rows(self, batch: Batch) -> Batch:
        assert self.rows is not None
        batch["features"] = self.rows.gathered(batch["index"], pinned=torch.cuda.is_initialized())
        return batch

    def finished(self, batch: Batch) -> Batch:
        """The batch on the device, with `features` as levels."""
        if self.device:
            numbers = torch.stack([batch[key] for key in NUMBERS]).to(self.device, non_blocking=True)
            batch |= zip(NUMBERS, numbers, strict=True)
            for key in PICTURES:
                if key in batch:
                    batch[key] = self.dataset.pipeline.normalised(batch[key].to(self.device, non_blocking=True))  # type: ignore[attr-defined]
        if self.rows is not None:
            if self.rows.on_device is not None:
                rows = self.rows.on_device.index_select(0, batch["index"])
            else:
                rows = batch["features"].to(self.device or "cpu", non_blocking=True)
            batch["features"] = self.rows.levels(rows)
        return batch


def ahead(batches: Iterator[Any]) -> Generator[Any, None, None]:
    """The same batches; a thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def worker_count(workers: int | str) -> int:
    """`workers`; "auto" is none on a CPU, where they would take cores from training. Beside a GPU it is one for each
    core of this rank but one, up to 8: a run has set OMP_NUM_THREADS to the rank's share of the cores.
    """
    if workers != "auto":
        return int(workers)
    if not torch.cuda.is_available():
        return 0
    return min(8, max(1, threads() - 1))


def one_thread(worker: int) -> None:
    """Loader processes share the cores with training: one thread each. Signals are for the process that trains."""
    signals.leave_to_parent()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
