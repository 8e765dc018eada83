"""Computes the features of all images once, before a method with frozen features is trained or tested."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from anomalib_lite.console import ProgressBar
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.cache import CHUNK_BYTES, CHUNK_IMAGES, GPU_BATCH, TYPES, FeatureFiles, image_key, key
from anomalib_lite.paths import cache_folder

log = logging.getLogger(__name__)

Levels = list[Tensor]  # [B, C_i, H_i, W_i]
# Images of every forward pass on a CPU. With another number, a network's output may differ in its last bit.
BATCH = 16


def precompute(
    trainer: L.Trainer,
    data: AnomalyDataModule,
    backbone: Backbone,
    cache: dict[str, Any],
    memory_gb: float,
    fit: bool = True,
    kept: Callable[[Levels], Levels] = list,
    keeps: str = "",
    of_test: bool = True,
) -> tuple[StoredFeatures, dict[str, Any]]:
    """Compute the features of training and (`of_test`) test images, and return them with a report for result.json.

    The features are stored in files that runs share (the `cache` group of the configuration). Without such files, the
    training images' features are held in memory if they need at most `memory_gb`; otherwise none are stored, and every
    batch computes its own. If `fit` is False, only features that the cache already holds are used.

    What is stored is what `kept` makes of the backbone's outputs for a batch. The text `keeps` identifies it in the
    files' key; it is empty if the outputs are kept as they are.

    Every rank must call this function, after the process group has been joined. Features of training images that are
    cropped, augmented or corrupted are not stored.
    """
    train = unchanged_images(data)
    paths = list(dict.fromkeys([*train, *(str(sample.path) for sample in data.test_samples if of_test)]))
    stored, report = StoredFeatures(data.eval_pipeline), {"used": False}
    if cache["enabled"] and paths:
        extraction = Extraction(trainer, data, backbone.to(trainer.strategy.root_device), cache, kept, keeps)
        stored, report = extraction.shared(paths) if fit else extraction.from_cache(paths)
    if fit and train and memory_gb and not report["used"]:
        stored = in_memory(trainer, data, backbone.to(trainer.strategy.root_device), train, memory_gb * 2**30, kept)
    return stored, report


def unchanged_images(data: AnomalyDataModule) -> list[str]:
    """The training images; none if training crops, augments or corrupts them."""
    changed = data.train_pipeline is not data.eval_pipeline or data.corrupt is not None
    return [] if changed else [str(sample.path) for sample in data.train_samples]


class Extraction:
    """Fills the files that runs share. After a problem on one rank, no rank uses the cache."""

    def __init__(
        self,
        trainer: L.Trainer,
        data: AnomalyDataModule,
        backbone: Backbone,
        cache: dict[str, Any],
        kept: Callable[[Levels], Levels],
        keeps: str,
    ):
        self.trainer, self.data, self.backbone, self.cache = trainer, data, backbone, cache
        self.kept, self.keeps = kept, keeps
        self.problem = ""

    def agreed(self) -> bool:
        """Whether no rank has a problem; all ranks must call this method at the same point."""
        return self.trainer.strategy.reduce_boolean_decision(not self.problem)

    @contextlib.contextmanager
    def noting_problems(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = str(error) or repr(error)
        except (TypeError, NotImplementedError) as error:
            self.problem = f"data.transform has no description ({error})"

    def open(self, paths: list[str]) -> StoredFeatures:
        """The features that the files already hold."""
        stored, strategy = StoredFeatures(self.data.eval_pipeline), self.trainer.strategy
        about: dict[str, Any] | None = None
        with self.noting_problems():
            about = key(self.backbone, self.data.eval_pipeline, strategy.root_device, self.cache["dtype"], self.keeps)
        if not strategy.reduce_boolean_decision(about == strategy.broadcast(about)):
            self.problem = self.problem or "the ranks compute on different devices, whose features are not equal"
        if about is None or self.problem:
            return stored
        with self.noting_problems():
            root = Path(self.cache["folder"] or cache_folder() / "features").expanduser()
            self.files = FeatureFiles(root, about)
            self.keys = {path: image_key(path) for path in paths}
            self.files.load(self.keys, stored)
        return stored

    def from_cache(self, paths: list[str]) -> tuple[StoredFeatures, dict[str, Any]]:
        stored = self.open(paths)
        return stored, self.report(stored, paths, computed=0)

    def shared(self, paths: list[str]) -> tuple[StoredFeatures, dict[str, Any]]:
        """All features from the cache; the ranks compute missing ones together. An empty store if that fails."""
        stored, missing = self.open(paths), list[str]()
        complete = self.agreed() and self.trainer.strategy.reduce_boolean_decision(stored.holds(paths))
        if self.agreed() and not complete:
            with contextlib.ExitStack() as lock:
                with self.noting_problems():
                    if self.trainer.is_global_zero:  # the other ranks wait for it in `agreed`
                        lock.enter_context(self.files.locked())
                if self.agreed():  # rank 0 has the lock; now all ranks read files written meanwhile
                    with self.noting_problems():
                        self.files.load(self.keys, stored)
                        missing = [path for path in paths if not stored.holds([path])]
                        self.fill(missing)
                    if self.agreed() and missing:
                        self.files.load({path: self.keys[path] for path in missing}, stored)  # of all ranks
        if self.agreed() and not stored.holds(paths):
            self.problem = (
                "its files are gone: another program has removed them, or cache.folder is not shared by all nodes"
            )
        if not self.agreed():
            if self.trainer.is_global_zero:
                log.warning("the feature cache is not used: %s", self.problem or "another rank could not write")
            return StoredFeatures(self.data.eval_pipeline), {"used": False, "why": self.problem}
        return stored, self.report(stored, paths, len(missing))

    def fill(self, missing: list[str]) -> None:
        """Compute this rank's share of the missing features, in whole batches, and write them into new files.

        A thread writes a file while the next one's features are computed.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = in_batches(missing, self.backbone)[rank::world]
        writing: Future[None] | None = None
        names: list[str] = []
        rows: list[Tensor] = []
        shapes: list[tuple[int, ...]] = []
        quiet = not self.trainer.is_global_zero
        with ProgressBar("features", sum(map(len, batches)), quiet=quiet) as bar, ThreadPoolExecutor(1) as writer:
            for number, (batch, levels) in enumerate(outputs(self.data, self.backbone, batches, self.kept)):
                if not number:
                    shapes, dtype = shapes_of(levels), TYPES.get(self.cache["dtype"]) or smallest_type(levels)
                    row_bytes = row_size(shapes) * dtype.itemsize
                    if self.trainer.is_global_zero:
                        self.files.make_room(len(missing) * row_bytes, self.cache["limit_gb"] * 2**30)
                names += [self.keys[path] for path in batch]
                rows.append(as_rows(levels, dtype)[: len(batch)])
                full = len(names) >= CHUNK_IMAGES or len(names) * row_bytes >= CHUNK_BYTES
                if full or number == len(batches) - 1:
                    if writing:
                        writing.result()
                    writing = writer.submit(self.files.write, names, torch.cat(rows), shapes)
                    names, rows = [], []
                bar.step(count=len(batch))
            if writing:
                writing.result()

    def report(self, stored: StoredFeatures, paths: list[str], computed: int) -> dict[str, Any]:
        if not stored.holds(paths):
            return {"used": False}
        row = stored.row(paths[0])
        size, dtype = round(len(paths) * row.nbytes / 2**30, 3), str(row.dtype).removeprefix("torch.")
        return {"used": True, "images": len(paths), "computed": computed, "gb": size, "type": dtype}


def in_memory(
    trainer: L.Trainer,
    data: AnomalyDataModule,
    backbone: Backbone,
    paths: list[str],
    limit: float,
    kept: Callable[[Levels], Levels],
) -> StoredFeatures:
    """Features of these images, held in memory; an empty store if they need more than `limit` bytes."""
    stored, table, done = StoredFeatures(data.eval_pipeline), torch.empty(0), 0
    with ProgressBar("features", len(paths), quiet=not trainer.is_global_zero) as bar:
        for batch, levels in outputs(data, backbone, in_batches(paths, backbone), kept):
            if not done:
                dtype, stored.shapes = smallest_type(levels), shapes_of(levels)
                needed = len(paths) * row_size(stored.shapes) * dtype.itemsize
                if needed > limit:
                    log.info(
                        "the training images' features need %.1f GB, more than hardware.feature_memory_gb: every batch "
                        "computes its own",
                        needed / 2**30,
                    )
                    return StoredFeatures(data.eval_pipeline)
                table = torch.empty(len(paths), row_size(stored.shapes), dtype=dtype)
            table[done : done + len(batch)] = as_rows(levels, dtype)[: len(batch)]
            done += len(batch)
            bar.step(count=len(batch))
    stored.add(table, {path: row for row, path in enumerate(paths)})
    return stored


def outputs(
    data: AnomalyDataModule, backbone: Backbone, batches: list[list[str]], kept: Callable[[Levels], Levels]
) -> Iterator[tuple[list[str], Levels]]:
    """(paths, kept levels) of each batch. A short batch is padded, so that every forward pass has as many images."""
    size, device = images_per_pass(backbone), next(backbone.parameters()).device
    loader = data.plain_dataloader([path for batch in batches for path in batch], size)
    for batch, loaded in zip(batches, loader, strict=True):
        images = loaded["image"].to(device)
        yield batch, kept(backbone(torch.cat([images, images[-1:].expand(size - len(images), -1, -1, -1)])))


def images_per_pass(backbone: Backbone) -> int:
    return GPU_BATCH if next(backbone.parameters()).is_cuda else BATCH


def in_batches(paths: list[str], backbone: Backbone) -> list[list[str]]:
    size = images_per_pass(backbone)
    return [paths[at : at + size] for at in range(0, len(paths), size)]


def row_bytes(backbone: Backbone, kept: Callable[[Levels], Levels], size: tuple[int, int]) -> int:
    """Bytes of a stored row for images of this (height, width), found with one empty image."""
    levels = kept(backbone(torch.zeros(1, 3, *size, device=next(backbone.parameters()).device)))
    return row_size(shapes_of(levels)) * smallest_type(levels).itemsize


def shapes_of(levels: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """(H_i, W_i, C_i) of levels [B, C_i, H_i, W_i]."""
    return [tuple(level.movedim(1, -1).shape[1:]) for level in levels]


def row_size(shapes: Sequence[Sequence[int]]) -> int:
    return sum(height * width * channels for height, width, channels in shapes)


def as_rows(levels: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Levels [B, C_i, H_i, W_i] as rows [B, Σ H_i·W_i·C_i] on the CPU."""
    return torch.cat([level.movedim(1, -1).flatten(1).to(dtype) for level in levels], 1).cpu()


def smallest_type(levels: Sequence[Tensor]) -> torch.dtype:
    """The smallest dtype that holds these numbers exactly: bfloat16 if the backbone has computed in it."""
    exact = all(torch.equal(level, level.bfloat16().float()) for level in levels)
    return torch.bfloat16 if exact else torch.float32
