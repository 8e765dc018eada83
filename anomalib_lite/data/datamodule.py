"""The one LightningDataModule: reads, checks, splits and holds out once, then serves batches as plain dicts.

Everything random depends on `seed` and on a sample's place only, never on workers, ranks or what ran before.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from anomalib_lite.data import check as checks
from anomalib_lite.data.samples import DataSet, Sample, load_mask, load_rgb
from anomalib_lite.data.transforms import Pipeline, Resize, build, pair
from anomalib_lite.errors import UserError

CORRUPTED = "corrupted"  # the `defect` of a held-out training image that gets an artificial one
AUGMENT, SHUFFLE, HOLD_OUT, CORRUPT = range(4)  # streams of random numbers, each seeded by (seed, stream, ...)


class LoadError(UserError):
    """A UserError that leaves a worker process as it was: torch rebuilds it from a traceback, whose last line it is."""

    def __init__(self, message: str):
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rsplit(f"{type(self).__name__}: ", 1)[-1])


class ImageSet(Dataset):
    """Samples by position, or by (epoch, position) where the augmentation should differ from epoch to epoch."""

    def __init__(
        self, samples: list[Sample], categories: list[str], pipeline: Pipeline, seed: int, images: bool = True
    ):
        self.samples = samples
        self.categories = {name: i for i, name in enumerate(categories)}
        self.pipeline = pipeline
        self.seed = seed
        self.images = images

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        category = self.categories[sample.category]
        item = {"label": sample.label, "category": category, "path": str(sample.path), "index": index}
        if self.images:
            try:
                item["image"], item["mask"] = self._load(sample, epoch, index)
            except UserError as error:
                raise LoadError(str(error)) from None
        return item

    def _load(self, sample: Sample, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = load_rgb(sample.path)
        mask = np.zeros(image.shape[:2], bool) if sample.mask is None else load_mask(sample.mask)
        corrupt = None
        if sample.defect == CORRUPTED:
            from anomalib_lite.data.corruptions import corrupt as corrupt_image  # only runs that validate need it

            corrupt = partial(corrupt_image, rng=np.random.default_rng([self.seed, CORRUPT, index]))
        return self.pipeline(image, mask, (self.seed, AUGMENT, epoch, index), corrupt)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: image float32 [B, 3, H, W], mask bool [B, H, W], label, category, index int64 [B], path list."""
    batch: dict[str, Any] = {key: torch.tensor([i[key] for i in items]) for key in ("label", "category", "index")}
    batch["path"] = [item["path"] for item in items]
    if "image" in items[0]:
        for item in items:
            if item["image"].shape != items[0]["image"].shape:
                raise LoadError(
                    f"{item['path']}: another size than the rest of its batch; add a Resize to data.transform"
                )
        batch["image"] = torch.stack([item["image"] for item in items])
        batch["mask"] = torch.stack([item["mask"] for item in items])
    return batch


class NewImages(Dataset):
    """Images to predict on; one that can't be read is the message that says so."""

    def __init__(self, files: Sequence[Path], category: int, pipeline: Pipeline):
        self.files, self.category, self.pipeline = files, category, pipeline

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            image = load_rgb(self.files[index])
        except UserError as error:
            return str(error)
        tensor, mask = self.pipeline(image, np.zeros(image.shape[:2], bool), (0, AUGMENT, 0, index))
        item = {"label": 0, "category": self.category, "path": str(self.files[index]), "index": index}
        return item | {"image": tensor, "mask": mask}


def collate_readable(items: list[dict[str, Any] | str]) -> dict[str, Any]:
    """`collate` of what could be read, and `damaged`, the messages of what could not."""
    readable = [item for item in items if not isinstance(item, str)]
    batch = collate(readable) if readable else {"path": []}
    return batch | {"damaged": [item for item in items if isinstance(item, str)]}


class TrainBatches(Sampler):
    """This rank's share of each global batch of a seeded permutation, as lists of (epoch, index).

    Global batches are the same for any number of ranks. The last one is short, filled up from the epoch's beginning as
    far as it takes to give every rank as many, or left out with `drop_last` unless it is the only one.
    `take_resume` gives (epoch, first batch) for the next iteration, or None.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        take_resume: Callable[[], tuple[int, int] | None] = lambda: None,
    ):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.drop_last = drop_last and length >= batch_size
        self.take_resume = take_resume
        self.epoch = 0

    @property
    def sampler(self) -> "TrainBatches":
        return self  # Lightning calls set_epoch on a loader's `batch_sampler.sampler`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # A generator, so that the position is taken with the first batch: a loader with workers asks for an iterator
        # twice and uses the second.
        self.epoch, first = self.take_resume() or (self.epoch, 0)
        order = np.random.default_rng([self.seed, SHUFFLE, self.epoch]).permutation(self.length)
        for number in range(first, len(self)):
            yield self._share(order, number)

    def _share(self, order: np.ndarray, number: int) -> list[tuple[int, int]]:
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        batch = np.concatenate([batch, np.resize(order, -len(batch) % self.world)])
        return [(self.epoch, int(index)) for index in batch[self.rank :: self.world]]


class AnomalyDataModule(L.LightningDataModule):
    """Training, validation and test samples of some categories, and their loaders.

    Args:
        reader: (root, category) -> DataSet; see `readers`.
        root: The data set's folder; after `setup` as an absolute path.
        category: A name, a list of names, or "all".
        name: What results call the data set.
        image_size: A side or [height, width], for the default transform.
        batch_size: Training images a step, over all devices together.
        eval_batch_size: Images a batch and device elsewhere.
        workers: Loader processes a device, or "auto".
        val_fraction: Share of training images, per category, to hold out; every second one is corrupted.
        seed: Of shuffling, augmentation, holding out and corrupting.
        split: Training samples -> those that the run may use; None is all.
        transform: albumentations transforms of every image; None is `Resize(image_size, resample)`.
        augment: More of them, after those, for training images only.
        normalize: "imagenet" or "none" ([0, 1]).
        resample: Filter of the default transform.
        check: "fast" (headers and file ends) or "thorough" (decode everything).
        drop_last: Leave out an epoch's last incomplete batch.

    Set `images_needed = False` before asking for a loader, and training and normal batches come without `image` and
    `mask`, nothing is decoded and no worker started. A Trainer needs `use_distributed_sampler=False`: ranks are
    dealt with here. Raises UserError for whatever a user can mend, also out of workers.
    """

    def __init__(
        self,
        reader: Callable[..., DataSet],
        root: str | Path | None = None,
        category: str | Sequence[str] = "all",
        name: str = "",
        image_size: int | Sequence[int] = 256,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        workers: int | str = 0,
        val_fraction: float = 0.0,
        seed: int = 0,
        split: Callable[[list[Sample]], list[Sample]] | None = None,
        transform: Sequence | None = None,
        augment: Sequence | None = None,
        normalize: str = "imagenet",
        resample: str = "bilinear",
        check: str = "fast",
        drop_last: bool = False,
    ):
        super().__init__()
        self.reader, self.root, self.category, self.name = reader, root, category, name
        self.image_size = pair(image_size)
        self.batch_size, self.eval_batch_size, self.workers = batch_size, eval_batch_size, workers
        self.val_fraction, self.seed, self.split, self.check, self.drop_last = (
            val_fraction,
            seed,
            split,
            check,
            drop_last,
        )
        self._validate()
        transform = [Resize(self.image_size, resample)] if transform is None else transform
        self.eval_pipeline = build(transform, normalize=normalize)
        self.train_pipeline = build(transform, augment or (), normalize)
        self.augment = list(augment or ())
        self.images_needed = True
        self._ready = False
        self._resume: tuple[int, int] | None = None

    def _validate(self) -> None:
        for option in ("batch_size", "eval_batch_size"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"data.{option}={value} must be a whole number above 0")
        if self.workers != "auto" and (not isinstance(self.workers, int) or self.workers < 0):
            raise UserError(f"data.workers={self.workers} must be 'auto' or a number of processes, 0 for none")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"data.val_fraction={self.val_fraction} must be at least 0 and below 1")
        if self.check not in ("fast", "thorough"):
            raise UserError(f"data.check={self.check} is not known: choose fast or thorough")
        for option, value in (("data.reader", self.reader), ("split", self.split)):
            if not (callable(value) or (option == "split" and value is None)):
                raise UserError(f"{option}={value} must be a _target_ with _partial_: true; see the files of conf/data")

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and hold out, once; `stage` does not matter."""
        if self._ready:
            return
        data = self.reader(self.root, self.category)
        self.notes = data.notes + checks.check(data, thorough=self.check == "thorough")
        self.root = data.root
        self.fingerprint = fingerprint(data)
        self.categories = list(dict.fromkeys(s.category for s in data.train))
        self.test_samples = data.test
        self.train_samples, self.val_samples = self._hold_out(self.split(data.train) if self.split else data.train)
        if not self.train_samples:
            raise UserError("split: it left no training images; choose another split")
        self.train_counts = {c: sum(s.category == c for s in self.train_samples) for c in self.categories}
        self.test_counts = {c: self._count_test(c) for c in self.categories}
        self.has_masks = {c: self._has_masks(c) for c in self.categories}
        self._ready = True

    def _count_test(self, category: str) -> dict[str, int]:
        labels = [s.label for s in self.test_samples if s.category == category]
        return {"good": labels.count(0), "defective": labels.count(1)}

    def _has_masks(self, category: str) -> bool:
        """Whether pixel metrics can be computed: there are defective test images and all have a mask."""
        masks = [s.mask for s in self.test_samples if s.category == category and s.label == 1]
        return bool(masks) and None not in masks

    def _hold_out(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        if self.val_fraction == 0:
            return samples, []
        held: list[Sample] = []
        for category in self.categories:
            mine = [s for s in samples if s.category == category]
            share = min(max(1, round(self.val_fraction * len(mine))), len(mine) - 1)
            if share < 2:
                # image metrics need a normal and a corrupted image
                self.notes.append(f"{category}: {len(mine)} training images are too few to validate on a share of them")
            # The category's name, not its position, seeds the draw: it does not depend on what else is trained on.
            rng = np.random.default_rng([self.seed, HOLD_OUT, *category.encode()])
            drawn = sorted(rng.permutation(len(mine))[: max(share, 0)])
            held += [replace(mine[i], defect=CORRUPTED, label=1) if n % 2 else mine[i] for n, i in enumerate(drawn)]
        paths = {s.path for s in held}
        self.notes.append(f"data.val_fraction={self.val_fraction}: {len(held)} training images held out for validation")
        return [s for s in samples if s.path not in paths], held

    # --- loaders ---

    def train_dataloader(self) -> DataLoader:
        rank, world = self._rank_and_world()
        if self.batch_size % world:
            raise UserError(f"data.batch_size={self.batch_size} must divide by the {world} devices that share it")
        batches = TrainBatches(
            len(self.train_samples), self.batch_size, self.seed, rank, world, self.drop_last, self._take_resume
        )
        dataset = self._images(self.train_samples, self.train_pipeline, self.images_needed)
        return self._loader(dataset, persistent=True, batch_sampler=batches)

    def normal_dataloader(self, sharded: bool = False) -> DataLoader:
        """Training images in order without augmentation: all of them on each rank, or its share if `sharded`."""
        return self._in_order(self._images(self.train_samples, self.eval_pipeline, self.images_needed), sharded)

    def val_dataloader(self) -> DataLoader | list:
        if not self.val_samples:
            return []
        return self._in_order(self._images(self.val_samples, self.eval_pipeline), sharded=True, persistent=True)

    def test_dataloader(self) -> DataLoader:
        return self._in_order(self._images(self.test_samples, self.eval_pipeline), sharded=True)

    def new_dataloader(self, files: Sequence[Path], category: int, batch_size: int, workers: int) -> DataLoader:
        """Images that belong to no data set, in order; `damaged` of a batch lists what could not be read of it."""
        files = NewImages(files, category, self.eval_pipeline)
        return DataLoader(files, batch_size, num_workers=workers, collate_fn=collate_readable)

    def resume_at(self, epoch: int, batch: int) -> None:
        """The next iteration over the training loader starts at that batch of that epoch; later ones at 0."""
        self._resume = (epoch, batch)

    def _take_resume(self) -> tuple[int, int] | None:
        resume, self._resume = self._resume, None
        return resume

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _images(self, samples: list[Sample], pipeline: Pipeline, images: bool = True) -> ImageSet:
        return ImageSet(samples, self.categories, pipeline, self.seed, images)

    def _in_order(self, dataset: ImageSet, sharded: bool, persistent: bool = False) -> DataLoader:
        """Rank r's share is r::world, without padding: 5 samples on 2 ranks are 3 and 2."""
        rank, world = self._rank_and_world() if sharded else (0, 1)
        share = range(rank, len(dataset), world)
        return self._loader(dataset, persistent, batch_size=self.eval_batch_size, sampler=share)

    def _loader(self, dataset: ImageSet, persistent: bool, **how: Any) -> DataLoader:
        workers = self._worker_count() if dataset.images else 0
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=on_cuda and dataset.images,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_one_thread if workers else None,
            # Its own generator: each iteration draws a number, which must not move the global one that training uses.
            generator=torch.Generator().manual_seed(self.seed),
            **how,
        )

    def _worker_count(self) -> int:
        """`workers`; "auto" is a few beside a GPU, none on a CPU, where they would take cores from training."""
        if self.workers != "auto":
            return int(self.workers)
        if not torch.cuda.is_available():
            return 0
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = max(1, torch.cuda.device_count()) if self._rank_and_world()[1] > 1 else 1
        return min(4, max(1, cpus // devices))


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def fingerprint(data: DataSet) -> str:
    """SHA-256 over the sorted files' paths below the root, sizes, labels and masks: the same wherever the root lies."""

    def entry(path: Path | None) -> str:
        return f"{path.relative_to(data.root).as_posix()}\t{path.stat().st_size}" if path else ""

    lines = [
        f"{part}\t{s.label}\t{entry(s.path)}\t{entry(s.mask)}"
        for part, samples in (("train", data.train), ("test", data.test))
        for s in samples
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
