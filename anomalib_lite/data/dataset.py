"""From samples to batches: what a loader's workers run, and the order in which a training loader asks for samples.

Everything random depends on the seed and on a sample's place only, never on workers, ranks or what ran before.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from anomalib_lite.data.samples import Sample, load_mask, load_rgb, size_of
from anomalib_lite.data.transforms import Pipeline, resize_mask
from anomalib_lite.errors import UserError

CORRUPTED = "corrupted"  # the `defect` of a held-out training image that gets an artificial one
MapSize = tuple[int, int] | str | None  # of maps that are compared with masks: (H, W), "original", None: the input's
# streams of random numbers, each seeded by (seed, stream, ...)
AUGMENT, SHUFFLE, HOLD_OUT, CORRUPT, CORRUPT_TRAINING, BALANCE = range(6)


class LoadError(UserError):
    """A UserError that leaves a worker process as it was: torch rebuilds it from a traceback, whose last line it is."""

    def __init__(self, message: str):
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rsplit(f"{type(self).__name__}: ", 1)[-1])


class ImageSet(Dataset):
    """Samples by position, or by (epoch, position) where the augmentation should differ from epoch to epoch.

    With a `map_size` an item has `truth` too, the mask at that size, and with "original" its image's `size` (H, W).
    With `corrupt`, (uint8 image, rng) -> (image, mask), `image` is corrupted anew in every epoch, `clean` is as it was
    and `corruption_mask` says where they differ; `pairs` gives these two without that, for held-out images, of which
    those marked as CORRUPTED are, always in the same way.
    """

    def __init__(
        self,
        samples: list[Sample],
        categories: list[str],
        pipeline: Pipeline,
        seed: int,
        images: bool = True,
        map_size: MapSize = None,
        corrupt: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None,
        pairs: bool = False,
    ):
        self.samples = samples
        self.categories = {name: i for i, name in enumerate(categories)}
        self.pipeline = pipeline
        self.seed = seed
        self.images, self.map_size = images, map_size
        self.corrupt, self.pairs = corrupt, pairs or corrupt is not None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        category = self.categories[sample.category]
        item = {"label": sample.label, "category": category, "path": str(sample.path), "index": index}
        try:
            if self.images:
                item |= self._load(sample, epoch, index)
            elif self.map_size == "original":
                item["size"] = size_of(sample.path)
        except UserError as error:
            raise LoadError(str(error)) from None
        return item

    def _load(self, sample: Sample, epoch: int, index: int) -> dict[str, Any]:
        image = load_rgb(sample.path)
        mask = np.zeros(image.shape[:2], bool) if sample.mask is None else load_mask(sample.mask)
        clean, truth = self.pipeline.transform(image, mask, (self.seed, AUGMENT, epoch, index))
        shown, changed = clean, np.zeros(clean.shape[:2], bool)
        held_out = sample.defect == CORRUPTED
        if held_out:
            from anomalib_lite.data.corruptions import corrupt  # only runs that validate need it

            shown, changed = corrupt(clean, np.random.default_rng([self.seed, CORRUPT, index]))
            truth = changed
        elif self.corrupt is not None:
            shown, changed = self.corrupt(clean, np.random.default_rng([self.seed, CORRUPT_TRAINING, epoch, index]))
        item: dict[str, Any] = {"image": self.pipeline.tensor(shown), "mask": torch.from_numpy(truth)}
        if self.pairs:
            item["clean"] = self.pipeline.tensor(clean)
            item["corruption_mask"] = torch.from_numpy(changed)
        if self.map_size == "original":
            item["size"] = mask.shape
        if self.map_size is not None:
            size = mask.shape if isinstance(self.map_size, str) else self.map_size
            item["truth"] = torch.from_numpy(resize_mask(truth if held_out else mask, size))
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: image float32 [B, 3, H, W], mask bool [B, H, W], label, category, index int64 [B], path list.

    Where items have them: `size` int64 [B, 2], `truth`, a list of bool [H_i, W_i], `clean` float32 [B, 3, H, W] and
    `corruption_mask` bool [B, H, W].
    """
    numbers = [key for key in ("label", "category", "index", "size") if key in items[0]]
    batch: dict[str, Any] = {key: torch.tensor([item[key] for item in items]) for key in numbers}
    batch["path"] = [item["path"] for item in items]
    if "image" in items[0]:
        for item in items:
            if item["image"].shape != items[0]["image"].shape:
                raise LoadError(
                    f"{item['path']}: another size than the rest of its batch; add a Resize to data.transform"
                )
        for key in ("image", "mask", "clean", "corruption_mask"):
            if key in items[0]:
                batch[key] = torch.stack([item[key] for item in items])
    if "truth" in items[0]:
        batch["truth"] = [item["truth"] for item in items]
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
        item["size"] = image.shape[:2]
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
    `done` gives the number of batches trained on: an iteration goes on from there (Lightning's count of epochs lags
    after some resumes). None: the epoch of `set_epoch`, from its first batch on.

    With `classes`, the class of each sample, an epoch draws each of the C classes ceil(length / C) times, so that it
    has about as many batches as without. It is a chain of rounds that hold every class once; a class goes through
    seeded permutations of its samples, on from where the last epoch left off. In the place of the epoch then stands
    how often the sample has been drawn before: each time it is augmented anew.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        done: Callable[[], int] | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.members = None if classes is None else _members(classes)
        if self.members:
            length = len(self.members) * -(-length // len(self.members))
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.drop_last = drop_last and length >= batch_size
        self.done = done
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
        self.epoch, first = divmod(self.done(), len(self)) if self.done else (self.epoch, 0)
        order = self._balanced() if self.members else self._permuted()
        for number in range(first, len(self)):
            yield self._share(order, number)

    def _permuted(self) -> np.ndarray:
        """(epoch, index) of an epoch, [N, 2]."""
        order = np.random.default_rng([self.seed, SHUFFLE, self.epoch]).permutation(self.length)
        return np.stack([np.full(self.length, self.epoch), order], 1)

    def _balanced(self) -> np.ndarray:
        """(times drawn before, index) of an epoch in which all classes are drawn equally often, [N, 2]."""
        assert self.members
        rounds = self.length // len(self.members)
        drawn = []
        for name, indices in self.members.items():
            places = np.arange(self.epoch * rounds, (self.epoch + 1) * rounds)
            order = np.empty((rounds, 2), np.int64)
            for turn in np.unique(places // len(indices)):
                rng = np.random.default_rng([self.seed, BALANCE, int(turn), *name.encode()])
                rows = places // len(indices) == turn
                order[rows, 0], order[rows, 1] = turn, rng.permutation(indices)[places[rows] % len(indices)]
            drawn.append(order)
        rng = np.random.default_rng([self.seed, SHUFFLE, self.epoch])
        within = rng.permuted(np.tile(np.arange(len(drawn)), (rounds, 1)), axis=1)  # a round a row: every class once
        return np.stack(drawn)[within, np.arange(rounds)[:, None]].reshape(-1, 2)

    def _share(self, order: np.ndarray, number: int) -> list[tuple[int, int]]:
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        batch = np.concatenate([batch, np.resize(order, (-len(batch) % self.world, 2))])
        return [(int(epoch), int(index)) for epoch, index in batch[self.rank :: self.world]]


def _members(classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions of each class's samples."""
    return {name: np.flatnonzero(np.array(classes, object) == name) for name in dict.fromkeys(classes)}


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
