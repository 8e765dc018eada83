"""The Dataset class, which turns samples into the items of a batch in the loader's workers.

Random numbers depend on the seed, the epoch and a sample's position only, never on workers, ranks or earlier runs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from anomalib_lite.data.image_files import read_header
from anomalib_lite.data.kept_images import KeptImages
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.samples import Sample, load_mask
from anomalib_lite.data.transforms import resize_mask
from anomalib_lite.errors import UserError

MapSize = tuple[int, int] | str | None  # size of maps and masks: (H, W), "original", None: the input's
# Streams of random numbers: every generator is seeded by (seed, stream, ...).
AUGMENT, SHUFFLE, HOLD_OUT, CORRUPT, CORRUPT_TRAINING, BALANCE, THRESHOLDS = range(7)


class LoadError(UserError):
    """A UserError raised in a worker process: torch rebuilds it from the traceback, whose last line is the message."""

    def __init__(self, message: str):
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].rsplit(f"{type(self).__name__}: ", 1)[-1])


class Batch(dict[str, Any]):
    """A batch: a dict whose error for a missing key names the switch that adds the key."""

    SWITCHES: ClassVar = {
        **dict.fromkeys(("image", "mask"), "the method has uses_images = False; set uses_images = True in its class"),
        **dict.fromkeys(
            ("clean", "corruption_mask"), "only training batches with data.corrupt have it; give data.corrupt"
        ),
        "features": "only stored features come with a batch; call self.features(batch), which reads or computes them, "
        "and set frozen_features = True in the method's class to store them",
    }

    def __missing__(self, key: str) -> Any:
        why = self.SWITCHES.get(key, f"no such key; this batch has {', '.join(sorted(self))}")
        raise UserError(f"batch['{key}']: {why}")

    def __or__(self, other: dict[str, Any]) -> "Batch":  # type: ignore[override]
        return Batch({**self, **other})


class AnomalyDataset(Dataset):
    """Samples by position, or by (epoch, position) if the augmentation differs from epoch to epoch.

    Args:
        samples: the images. categories: names of the classes; the label `category` is an index into these names.
        pipeline: prepares every image. seed: seed of augmentation and corruption.
        images: False: images are not decoded, and items have no `image`.
        truth: True: items have `mask` even if images are not decoded, which then takes a pipeline that only resizes.
        map_size: items also have `gt_mask`, the mask at this size, and with "original" `size`, the image's own (H, W).
        corrupt: (uint8 image, rng) -> (image, mask). Every epoch corrupts `image` anew; `clean` is the image without
            corruption, and `corruption_mask` marks where the two differ.
        pairs: True: items of held-out images have `clean` and `corruption_mask` even without `corrupt`. Samples with
            an artificial defect are corrupted, in every epoch in the same way.
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
        truth: bool = False,
    ):
        self.samples = samples
        self.categories = {name: i for i, name in enumerate(categories)}
        self.pipeline = pipeline
        self.seed = seed
        self.images, self.map_size, self.truth = images, map_size, truth
        #: True: images are normalised float32 [3, H, W]; False: uint8 [H, W, 3], for `Pipeline.normalised` on a GPU
        self.normalises = True
        #: resized images that are decoded once, where the pipeline allows it
        self.kept_images: KeptImages | None = None
        #: whether items are all tiles, one image after the other, for which the last decoded image is kept; see `Tile`
        self.all_tiles, self.last = False, dict[Path, tuple[np.ndarray, np.ndarray]]()
        self.corrupt, self.pairs = corrupt, pairs or corrupt is not None
        #: whether an item's image may differ from the pipeline's output for the file
        self.corrupts = corrupt is not None or any(sample.artificial for sample in samples)

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
            elif self.truth:
                own = self._own_mask(sample, read_header(sample.path).size)
                resize = self.pipeline.resize
                item |= {"mask": torch.from_numpy(resize_mask(own, resize.size) if resize else own)}
                item |= self._truth(own, own)
            elif self.map_size == "original":
                item["size"] = read_header(sample.path).size
        except UserError as error:
            raise LoadError(str(error)) from None
        return item

    def _own_mask(self, sample: Sample, size: tuple[int, int]) -> np.ndarray:
        """The mask of the file's image of this (height, width), bool [H, W]."""
        return np.zeros(size, bool) if sample.mask is None else load_mask(sample.mask, sample.dark_mask)

    def _decoded(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """The image uint8 [H, W, 3] and its mask bool [H, W]."""
        if sample.path in self.last:
            return self.last[sample.path]
        image = self.pipeline.load(sample.path)
        mask = self._own_mask(sample, image.shape[:2])
        if self.all_tiles:
            self.last = {sample.path: (image, mask)}
        return image, mask

    def _prepared(self, sample: Sample, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The image uint8 [h, w, 3] and its mask bool [h, w] after all transforms, and the file's own mask."""
        resize = self.pipeline.resize
        if self.kept_images is None or resize is None:
            image, own = self._decoded(sample)
            return *self.pipeline.transform(image, own, seed, all_tiles=self.all_tiles), own
        kept = self.kept_images.get(sample.path)
        if kept is None:
            image = self.pipeline.load(sample.path)
            kept = self.kept_images.put(sample.path, resize.apply(image), image.shape[:2])
        image, own = kept[0], self._own_mask(sample, kept[1])
        mask = np.zeros(resize.size, bool) if sample.mask is None else resize_mask(own, resize.size)
        return *self.pipeline.transform(image, mask, seed, True, self.all_tiles), own

    def _load(self, sample: Sample, epoch: int, index: int) -> dict[str, Any]:
        clean, target, own = self._prepared(sample, (self.seed, AUGMENT, epoch, index))
        shown, changed = clean, np.zeros(clean.shape[:2], bool)
        if sample.artificial:
            from anomalib_lite.data.corruptions import corrupt  # imported only if images are held out

            shown, changed = corrupt(clean, np.random.default_rng([self.seed, CORRUPT, index]))
            target = changed
        elif self.corrupt is not None:
            shown, changed = self.corrupt(clean, np.random.default_rng([self.seed, CORRUPT_TRAINING, epoch, index]))
        item: dict[str, Any] = {"image": self._tensor(shown), "mask": torch.from_numpy(target)}
        if self.pairs:
            item["clean"] = self._tensor(clean)
            item["corruption_mask"] = torch.from_numpy(changed)
        return item | self._truth(own, own if self.pipeline.only_resizes and not sample.artificial else target)

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        return self.pipeline.tensor(image) if self.normalises else torch.from_numpy(np.ascontiguousarray(image))

    def _truth(self, own: np.ndarray, target: np.ndarray) -> dict[str, Any]:
        """What `map_size` adds to an item, from the file's own mask and the mask that maps are compared with."""
        item: dict[str, Any] = {}
        if self.map_size == "original":
            item["size"] = own.shape
        if self.map_size is not None:
            size = own.shape if isinstance(self.map_size, str) else self.map_size
            item["gt_mask"] = torch.from_numpy(resize_mask(target, size))
        return item


def collate(items: list[dict[str, Any]]) -> Batch:
    """Join items to a batch: image float32 [B, 3, H, W], mask bool [B, H, W], label, category, index int64 [B], path.

    If items have them, the batch also holds `size` int64 [B, 2], `gt_mask` (list of bool [H_i, W_i]), `clean` float32
    [B, 3, H, W] and `corruption_mask` bool [B, H, W]. `path` is a list. Images that a GPU is to normalise are uint8
    [B, H, W, 3]. Raises LoadError if image sizes differ.
    """
    numbers = [key for key in ("label", "category", "index", "size") if key in items[0]]
    batch = Batch({key: torch.tensor([item[key] for item in items]) for key in numbers})
    batch["path"] = [item["path"] for item in items]
    if "image" in items[0]:
        for item in items:
            if item["image"].shape != items[0]["image"].shape:
                raise LoadError(
                    f"{item['path']}: its size differs from the rest of the batch; add a Resize to data.transform"
                )
    for key in ("image", "mask", "clean", "corruption_mask"):
        if key in items[0]:
            tensors = [item[key] for item in items]
            batch[key] = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # a large one is not copied
    if "gt_mask" in items[0]:
        batch["gt_mask"] = [item["gt_mask"] for item in items]
    return batch


class NewImages(Dataset):
    """Images for prediction. The item of an unreadable image, or of one that has not the (H, W) `size` once it is
    prepared, is an error message; with "original", images have any size.
    """

    def __init__(self, files: Sequence[Path], category: int, pipeline: Pipeline, size: tuple[int, int] | str):
        self.files, self.category, self.pipeline, self.size = files, category, pipeline, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            header = read_header(self.files[index])
            image = self.pipeline.load(self.files[index])
            tensor, mask = self.pipeline(image, np.zeros(image.shape[:2], bool), (0, AUGMENT, 0, index))
        except UserError as error:
            message = str(error)
            return message if message.startswith(str(self.files[index])) else f"{self.files[index]}: {message}"
        if self.size not in ("original", found := tuple(mask.shape)):
            left, wanted = ("×".join(map(str, each)) for each in (found, self.size))
            return f"{self.files[index]}: data.transform leaves {left} pixels, and the run's images have {wanted}"
        item = {"label": 0, "category": self.category, "path": str(self.files[index]), "index": index}
        item["size"] = image.shape[:2]
        return item | {"image": tensor, "mask": mask, "header": header}


def collate_readable(items: list[dict[str, Any] | str]) -> Batch:
    """`collate` for the images that can be scored, with their `headers`; `damaged` has the others' error messages."""
    readable = [item for item in items if not isinstance(item, str)]
    batch = collate(readable) if readable else Batch(path=[])
    batch["headers"] = [item["header"] for item in readable]
    return batch | {"damaged": [item for item in items if isinstance(item, str)]}
