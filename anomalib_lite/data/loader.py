"""From a dataset to batches on this process: stored features come with the batch, and training counts its batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_lite.cli import signals
from anomalib_lite.data.cores import threads
from anomalib_lite.data.dataset import AnomalyDataset, collate
from anomalib_lite.data.sampler import TrainBatchSampler
from anomalib_lite.data.transforms import Pipeline


@dataclass
class StoredFeatures:
    """A frozen backbone's features of images that `pipeline` has prepared.

    A row [Σ H_i·W_i·C_i] holds the levels of one image one after the other, channels last. Rows lie in memory or are
    mapped from files.
    """

    pipeline: Pipeline
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # (H_i, W_i, C_i) of every level
    rows: dict[str, Tensor] = field(default_factory=dict)  # by the image's path

    def holds(self, paths: Sequence[str]) -> bool:
        """Whether all of these images have a row; False for no images."""
        return bool(paths) and all(path in self.rows for path in paths)

    def rows_of(self, dataset: AnomalyDataset) -> list[Tensor] | None:
        """The rows of a dataset's images in its order; None if one is missing or the dataset changes its images.

        Crops, augmentations and corruptions change an image, so its stored features would be another image's.
        """
        paths = [str(sample.path) for sample in dataset.samples]
        if dataset.pipeline is not self.pipeline or dataset.corrupts or not self.holds(paths):
            return None
        return [self.rows[path] for path in paths]


class AnomalyLoader(DataLoader):
    """A loader that adds `features` to its batches where they are stored, and moves its training sampler on.

    `features` is a list of [B, H_i, W_i, C_i] in the type in which they are stored.
    """

    def __init__(self, dataset: AnomalyDataset, stored: StoredFeatures | None = None, **options: Any):
        super().__init__(dataset, collate_fn=collate, worker_init_fn=one_thread, **options)
        self.shapes = stored.shapes if stored else []
        self.rows = stored.rows_of(dataset) if stored else None

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """A generator: an iterator that nobody asks for a batch moves nothing on and starts no worker."""
        for batch in super().__iter__():
            if isinstance(self.batch_sampler, TrainBatchSampler):
                self.batch_sampler.next_batch += 1
            if self.rows is not None:
                batch["features"] = self.levels([self.rows[index] for index in batch["index"].tolist()])
            yield batch

    def levels(self, rows: Sequence[Tensor]) -> list[Tensor]:
        table = torch.empty(len(rows), len(rows[0]), dtype=rows[0].dtype)
        for place, row in zip(table, rows, strict=True):
            place.copy_(row)  # not torch.stack, whose result may have another type under autocast
        parts = table.split([height * width * channels for height, width, channels in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


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
