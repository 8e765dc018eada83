"""The one LightningDataModule: reads, checks, splits and holds out once, then serves batches as plain dicts."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from anomalib_lite.data import integrity as checks
from anomalib_lite.data import splits
from anomalib_lite.data import value_range as value_ranges
from anomalib_lite.data.data_options import check_options, reader_arguments
from anomalib_lite.data.dataset import AnomalyDataset, MapSize, NewImages, collate_readable
from anomalib_lite.data.held_out import fingerprint, hold_out
from anomalib_lite.data.kept_images import KeptImages
from anomalib_lite.data.loader import AnomalyLoader, worker_count
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.sampler import TrainBatchSampler, rank_and_world
from anomalib_lite.data.samples import DataSet, Sample, test_counts
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.data.tiling import Tiling
from anomalib_lite.data.transforms import pair
from anomalib_lite.data.treatment import prepare
from anomalib_lite.data.trial import try_out
from anomalib_lite.errors import UserError


class AnomalyDataModule(L.LightningDataModule):
    """Training, validation and test samples of some categories, and their loaders.

    Args:
        reader: (root, category) -> DataSet; see `readers`.
        root: The data set's folder; after `setup` as an absolute path.
        category: A name, a list of names, or "all".
        name: What results call the data set.
        image_size: A side or [height, width], for the default transform; of a texture, the training crops' size.
        batch_size: Training images per step, over all devices together.
        eval_batch_size: Images per batch and device elsewhere.
        workers: Loader processes per device, or "auto".
        image_memory_gb: Limit of the memory for training images that are decoded once; see `kept_images`.
        val_fraction: Share of training images, per category, to hold out; every second one is corrupted.
        seed: Of shuffling, augmentation, holding out and corrupting.
        split: DataSet -> Split, the training images that the run may use (see `splits`); None is all.
        balanced: Training batches draw every class equally often; see `TrainBatchSampler`.
        transform: albumentations transforms of every image; None is `Resize(image_size, resample)`.
        augment: More of them, after those, for training images only. `fit_dataloader` has `copies` of each image.
        normalize: "imagenet", "none" ([0, 1]), or {"mean": [R, G, B], "std": [R, G, B]}.
        resample: Filter of the default transform.
        check: "fast" (headers and file ends) or "thorough" (decode everything).
        drop_last: Leave out an incomplete last batch.
        corrupt: (uint8 image, rng) -> (image, mask), such as `corruptions.corrupt` with its parameters: training
            batches then carry the corrupted `image`, `clean` and `corruption_mask`; None leaves them as they are.
        treatment: "object": images are resized to `image_size`. "texture": training sees random crops of that size,
            test and prediction the whole image, both at `texture_size`. "auto": by data.treatment.TEXTURES.
        texture_size: A side, [height, width], or "original", where nothing is resized and images are evaluated one by
            one, with maps of their own sizes.
        tiling: Arguments of `tiling.Tiling`: images are cut into tiles, whose size is the `image_size`. Training sees a
            tile of every image per epoch, test and prediction whole images one by one, which the method cuts.
        map_size: Size at which evaluated masks come as `gt_mask`: (H, W), or "original" for each image's own size,
            which then comes as `size`. Not with a `transform`, which may move pixels.
        first_batch: Number of batches that a resumed run has trained on: the training loader continues after them.
        ranks: Gives this process's rank and the number of ranks, when a loader is made.
        value_range: [low, high] of images with more than 8 bits per channel; None: found over the training images.
        pixels: Depth and value range as a trained run stores them: nothing is found then.
        for_reader: Further arguments of the reader, those of `data_options.READER_KEYS`.

    `with_features` gives a copy whose loaders add a frozen backbone's stored features to their batches. A Trainer needs
    `use_distributed_sampler=False`: the DataModule shares the batches out to the ranks. User errors are UserErrors.
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
        image_memory_gb: float = 4,
        val_fraction: float = 0.0,
        seed: int = 0,
        split: Callable[[DataSet], splits.Split] | None = None,
        transform: Sequence | None = None,
        augment: Sequence | None = None,
        copies: int = 1,
        normalize: str | dict[str, Sequence[float]] = "imagenet",
        resample: str = "bilinear",
        check: str = "fast",
        drop_last: bool = False,
        balanced: bool = False,
        corrupt: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None,
        treatment: str = "object",
        texture_size: int | Sequence[int] | str = "original",
        tiling: dict[str, Any] | None = None,
        map_size: int | Sequence[int] | str | None = None,
        first_batch: int = 0,
        ranks: Callable[[], tuple[int, int]] = rank_and_world,
        value_range: Sequence[float] | None = None,
        pixels: value_ranges.Pixels | None = None,
        **for_reader: Any,
    ):
        super().__init__()
        self.reader, self.root, self.category, self.name = reader, root, category, name
        self.tiling = Tiling(**tiling, batch=eval_batch_size) if tiling else None
        self.tile_counts = dict[Path, int]()  # with tiling, the number of tiles of each image
        self.image_size = self.tiling.size if self.tiling else pair(image_size)
        self.map_size: MapSize = map_size if map_size is None or isinstance(map_size, str) else pair(map_size)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.image_memory_gb = workers, image_memory_gb
        self.val_fraction, self.seed, self.split, self.check = val_fraction, seed, split, check
        self.drop_last, self.balanced, self.copies = drop_last, balanced, copies
        self.corrupt, self.treatment, self.texture_size = corrupt, treatment, texture_size
        self.transform, self.augment, self.normalize, self.resample = transform, augment or (), normalize, resample
        self.notes, self.for_reader = list[str](), reader_arguments(for_reader)
        self.value_range, self.stored_pixels = value_range, pixels
        self.pixels = pixels or value_ranges.Pixels()
        check_options(vars(self))
        names = [category] if isinstance(category, str | int) else list(category)
        self._build_pipelines([] if category == "all" else [str(name) for name in names])
        self.first_batch, self.ranks = first_batch, ranks
        self.stored: StoredFeatures | None = None
        self.device: torch.device | None = None
        self.uses_images, self._ready, self._drawn = True, False, list[AnomalyLoader]()

    def _build_pipelines(self, categories: list[str]) -> None:
        """The transforms, once it is known whether the categories are textures."""
        self.texture, self.test_size, self.eval_pipeline, self.train_pipeline, notes = prepare(self, categories)
        self.notes += notes
        if self.test_size == "original" or self.tiling:  # images are evaluated one by one
            self.eval_batch_size, self.map_size = 1, self.map_size or self.test_size

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and hold out, once; `stage` does not matter."""
        if self._ready:
            return
        data = self.reader(self.root, self.category, **self.for_reader)
        self.categories = list(dict.fromkeys(s.category for s in data.train)) or list(self.category)
        self.kept = (self.split or splits.full)(data)
        if none := [name for name, number in self.kept.counts.items() if not number]:
            raise UserError(f"split: it left no training images of '{none[0]}'; choose another split")
        #: of the data set before the split: what runs with different shots have in common
        self.full_fingerprint = fingerprint(data) if self.kept.profile == splits.SHOTS else None
        data = replace(data, train=self.kept.train)
        headers, notes = checks.check(data, thorough=self.check == "thorough")
        self.pixels, of_pixels = value_ranges.pixels_of_run(data, headers, self.value_range, self.stored_pixels)
        self.notes = [*data.notes, *self.kept.notes, *notes, *of_pixels]
        self.root, self.fingerprint = data.root, fingerprint(data)
        self._build_pipelines(self.categories)
        self.test_samples = data.test
        self.train_samples, self.val_samples, notes = hold_out(data.train, self.val_fraction, self.seed)
        self.notes += notes
        self.train_counts = {c: sum(s.category == c for s in self.train_samples) for c in self.categories}
        self.test_counts, self.has_masks = test_counts(self.test_samples, self.categories)
        sizes = {path: header.size for path, header in headers.items()}
        if self.tiling:
            self.tile_counts = self.tiling.counts(sizes)
            self.notes.append(self.tiling.note(self.tile_counts))
        try_out(self, sizes)
        self._ready = True

    # --- loaders ---

    def with_features(
        self, stored: StoredFeatures | None, uses_images: bool = True, device: torch.device | None = None
    ) -> "AnomalyDataModule":
        """A copy whose batches are on `device` (None: the CPU), with stored features of all images that have them.

        Where the method needs no images (`uses_images` is False), batches with features come without `image`, in
        training also without `mask`; nothing is decoded for them and no loader process is started.
        """
        module = copy.copy(self)
        module.stored, module.uses_images, module.device, module._drawn = stored, uses_images, device, []
        return module

    @property
    def batches_per_epoch(self) -> int:
        return len(self._train_batches())

    def _train_batches(self, first_batch: int = 0) -> TrainBatchSampler:
        classes = [s.category for s in self.train_samples] if self.balanced else None
        how = (self.batch_size, self.seed, *self.ranks(), self.drop_last, first_batch, classes)
        return TrainBatchSampler(len(self.train_samples), *how)

    def train_dataloader(self, first_batch: int | None = None) -> AnomalyLoader:
        """Training batches from this one on (None: from the module's `first_batch`), counted from the run's start."""
        batches = self._train_batches(self.first_batch if first_batch is None else first_batch)
        return self._loader(self._train_images(), persistent=True, batch_sampler=batches)

    def fit_keys(self) -> list[tuple[int, int]]:
        """(copy, position) of all copies of the training images; with tiling of all their tiles, image by image."""
        counts = [self.copies * self.tile_counts.get(sample.path, 1) for sample in self.train_samples]
        keys = [(copy, i) for copy in range(max(counts)) for i, count in enumerate(counts) if copy < count]
        return sorted(keys, key=lambda key: key[1]) if self.tiling else keys

    def fit_dataloader(self) -> AnomalyLoader:
        """The images of `fit_keys`, prepared as in the first epochs: for methods in closed form."""
        images, batch_size = self._train_images(), self.tiling.batch if self.tiling else self.eval_batch_size
        batches = list(BatchSampler(self.fit_keys(), batch_size, drop_last=False))  # type: ignore[arg-type]
        images.all_tiles = self.tiling is not None
        return self._loader(images, batch_sampler=batches)

    def train_eval_dataloader(self, sharded: bool = False, positions: Sequence[int] | None = None) -> AnomalyLoader:
        """The training images (at these positions) once, in order, prepared as in test; all or a share on each rank."""
        images = self._images(self.train_samples, map_size=self.map_size)
        return self._in_order(images, sharded, False, positions)

    def training_batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        """A batch of these training images, prepared as in this epoch, on this rank: cheap enough for every step."""
        self._drawn = self._drawn or [
            self._loader(self._train_images(), workers=0)
        ]  # made once: a method may ask in every step
        return self._drawn[0].batch_of([(epoch, index) for index in indices])

    def val_dataloader(self) -> AnomalyLoader | list:
        if not self.val_samples:
            return []
        images = self._images(self.val_samples, map_size=self.map_size, truth=True, pairs=self.corrupt is not None)
        return self._in_order(images, True, persistent=True)

    def test_dataloader(self) -> AnomalyLoader:
        return self._in_order(self._images(self.test_samples, map_size=self.map_size, truth=True), sharded=True)

    def new_dataloader(self, files: Sequence[Path], category: int, batch_size: int, workers: int) -> DataLoader:
        """Images that belong to no data set, in order; `damaged` of a batch lists what can't be scored of it."""
        images = NewImages(files, category, self.eval_pipeline, self.test_size)
        batch_size = 1 if self.test_size == "original" or self.tiling else batch_size
        return DataLoader(images, batch_size, num_workers=workers, collate_fn=collate_readable)

    def plain_dataloader(self, paths: Sequence[str], batch_size: int) -> DataLoader:
        """These images of the data set, in order and prepared as in test, on this rank: what features are made of."""
        samples = {str(sample.path): sample for sample in [*self.test_samples, *self.train_samples]}
        images = self._images([replace(samples[path], mask=None) for path in paths], keeps=self.uses_images)
        return self._loader(images, batch_size=batch_size)

    def _train_images(self) -> AnomalyDataset:
        return self._images(self.train_samples, self.train_pipeline, corrupt=self.corrupt)

    def _images(
        self, samples: list[Sample], pipeline: Pipeline | None = None, keeps: bool = True, **options: Any
    ) -> AnomalyDataset:
        """Images of the data set, prepared as in test or by another pipeline, and decoded only where it takes an image.

        `keeps`: whether decoded training images are kept for the next time.
        """
        pipeline = pipeline or self.eval_pipeline
        dataset = AnomalyDataset(samples, self.categories, pipeline, self.seed, **options)
        held = self.stored is not None and self.stored.rows_of(dataset) is not None
        dataset.images = self.uses_images or not held or (dataset.truth and not pipeline.only_resizes)
        dataset.kept_images = self.kept_images if keeps and dataset.images else None
        return dataset

    @functools.cached_property
    def kept_images(self) -> KeptImages | None:
        """The images that several epochs see; made before the first loader process is."""
        often = [sample.path for sample in [*self.train_samples, *self.val_samples]]
        return KeptImages(often, self.eval_pipeline.resize, self.image_memory_gb)

    def _in_order(
        self, dataset: AnomalyDataset, sharded: bool, persistent: bool = False, positions: Sequence[int] | None = None
    ) -> AnomalyLoader:
        """Rank r's share is every world-th batch of one device's from the r-th on, without padding: beside other images
        a network's output may differ in its last bit."""
        rank, world = self.ranks() if sharded else (0, 1)
        batches = list(BatchSampler(positions or range(len(dataset)), self.eval_batch_size, drop_last=False))
        return self._loader(dataset, persistent, batch_sampler=batches[rank::world])

    def _loader(
        self, dataset: AnomalyDataset, persistent: bool = False, workers: int | None = None, **options: Any
    ) -> AnomalyLoader:
        if workers is None:
            workers = worker_count(self.workers) if dataset.images else 0
        return AnomalyLoader(dataset, self.stored, self.device, workers, self.seed, persistent, **options)
