"""Before a method with frozen features trains or is tested: the features of all its images, each computed once."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.features.cache import (
    BATCH,
    TYPES,
    FeatureFiles,
    FeatureStore,
    compact,
    image_key,
    key,
    row_size,
    shapes,
    table,
)
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.paths import cache_folder
from anomalib_lite.progress import ProgressBar

log = logging.getLogger(__name__)


class FrozenFeatures(L.Callback):
    """Gives a method with `frozen_features` the features of all training and test images, before anything else.

    From files that runs share (the `cache` group of the configuration); where there can be none, and for fitting
    only, in memory up to `hardware.feature_memory_gb`; else they are computed anew for every batch.
    """

    def __init__(self, data: AnomalyDataModule, cache: dict[str, Any], memory_gb: float):
        self.data, self.cache, self.memory = data, cache, memory_gb * 2**30
        self.report: dict[str, Any] = {"used": False}
        self.done = False

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Every feature before the first batch, computed by all ranks together."""
        self.done = True
        if not isinstance(module, AnomalyModule) or not module.frozen_features:
            return
        train, paths = self._paths()
        if self.cache["enabled"]:
            module.store = self._shared(trainer, module, paths)
        if not self.report["used"] and train:
            module.store = self._in_memory(trainer, module, train)
        self.data.images_needed = module.needs_images or not (train and module.store.holds(train))

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Without a fit before it, what the cache holds: a rank without batches does not come here, so no rank waits
        for another."""
        if self.done or not isinstance(module, AnomalyModule) or not module.frozen_features:
            return
        train, paths = self._paths()
        if self.cache["enabled"]:
            with contextlib.suppress(OSError, TypeError, NotImplementedError):
                files, keys = self._files(module, paths)
                module.store = files.load(keys)
                self._tell(module.store, paths, computed=0)
        self.data.images_needed = module.needs_images or not (train and module.store.holds(train))

    def _paths(self) -> tuple[list[str], list[str]]:
        """Of the training images whose features stay the same, and of all images."""
        train = [] if self.data.augment else [str(sample.path) for sample in self.data.train_samples]
        return train, list(dict.fromkeys([*train, *(str(sample.path) for sample in self.data.test_samples)]))

    def _files(self, module: AnomalyModule, paths: list[str]) -> tuple[FeatureFiles, dict[str, str]]:
        assert module.backbone is not None
        about = key(module.backbone, self.data.eval_pipeline, module.device, self.cache["type"])
        root = Path(self.cache["folder"] or cache_folder() / "features").expanduser()
        return FeatureFiles(root, about), {path: image_key(path) for path in paths}

    def _tell(self, store: FeatureStore, paths: list[str], computed: int) -> None:
        if store.holds(paths):
            row = store.rows[paths[0]]
            size, kind = round(len(paths) * row.nbytes / 2**30, 3), str(row.dtype).removeprefix("torch.")
            self.report = {"used": True, "images": len(paths), "computed": computed, "gb": size, "type": kind}

    def _shared(self, trainer: L.Trainer, module: AnomalyModule, paths: list[str]) -> FeatureStore:
        """All features from the cache, those that it lacked computed by all ranks; an empty store if that failed."""
        problem, store, missing = "", FeatureStore(), list[str]()
        try:
            files, keys = self._files(module, paths)
            store = files.load(keys)
        except (OSError, TypeError, NotImplementedError) as error:
            problem = str(error) or repr(error)
        agreed = self._all(trainer, problem)
        if agreed and not trainer.strategy.reduce_boolean_decision(store.holds(paths)):
            with contextlib.ExitStack() as lock:
                try:
                    if trainer.is_global_zero:
                        lock.enter_context(files.locked())
                        files.sweep()
                except OSError as error:
                    problem = str(error) or repr(error)
                if agreed := self._all(trainer, problem):  # rank 0 has the lock, and all of what was written meanwhile
                    try:
                        store = files.load(keys)
                        missing = [path for path in paths if not store.holds([path])]
                        self._fill(trainer, module, files, missing, keys)
                    except OSError as error:
                        problem = str(error) or repr(error)
                    agreed = self._all(trainer, problem)
                    store = files.load(keys) if agreed and missing else store  # all ranks' files are there now
        if agreed and not store.holds(paths):
            problem = "its files were removed by another program"
        if not self._all(trainer, problem):
            if trainer.is_global_zero:
                log.warning("the feature cache is not used: %s", problem or "another rank could not write")
            self.report = {"used": False, "why": problem}
            return FeatureStore()
        self._tell(store, paths, len(missing))
        return store

    def _all(self, trainer: L.Trainer, problem: str) -> bool:
        return trainer.strategy.reduce_boolean_decision(not problem)

    def _fill(
        self, trainer: L.Trainer, module: AnomalyModule, files: FeatureFiles, missing: list[str], keys: Any
    ) -> None:
        """This rank's share of the missing images' features, in whole batches, into a file of its own."""
        rank, world = trainer.global_rank, trainer.world_size
        batches = [missing[at : at + BATCH] for at in range(0, len(missing), BATCH)][rank::world]
        count, reserved = sum(map(len, batches)), False
        with files.writer() as writer, ProgressBar("features", count, quiet=not trainer.is_global_zero) as bar:
            for batch, levels in backbone_outputs(module, self.data, batches):
                if not reserved:
                    kind = self.cache["type"]
                    dtype = compact(levels) if kind == "auto" else TYPES[kind]
                    size = sum(map(row_size, shapes(levels))) * dtype.itemsize
                    if trainer.is_global_zero:
                        files.make_room(len(missing) * size, self.cache["limit_gb"] * 2**30)
                    writer.reserve(shapes(levels), dtype, count)
                    reserved = True
                writer.add([keys[path] for path in batch], levels)
                bar.step(count=len(batch))

    def _in_memory(self, trainer: L.Trainer, module: AnomalyModule, paths: list[str]) -> FeatureStore:
        batches = [paths[at : at + BATCH] for at in range(0, len(paths), BATCH)]
        store, rows = FeatureStore(), torch.empty(0)
        with ProgressBar("features", len(paths), quiet=not trainer.is_global_zero) as bar:
            for batch, levels in backbone_outputs(module, self.data, batches):
                if not store.shapes:
                    dtype, store.shapes = compact(levels), shapes(levels)
                    size = sum(map(row_size, store.shapes))
                    needed = len(paths) * size * dtype.itemsize
                    if needed > self.memory:
                        log.info(
                            "the training images' features need %.1f GB, more than hardware.feature_memory_gb: they "
                            "are computed anew for every batch",
                            needed / 2**30,
                        )
                        return FeatureStore()
                    rows = torch.empty(len(paths), size, dtype=dtype)
                into = rows[len(store.rows) : len(store.rows) + len(batch)]
                into.copy_(table([level[: len(batch)] for level in levels], rows.dtype))
                store.add(batch, into)
                bar.step(count=len(batch))
        return store


def backbone_outputs(
    module: AnomalyModule, data: AnomalyDataModule, batches: list[list[str]]
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(paths, levels) of each batch of images; a short one is filled up, so that every pass has BATCH images."""
    full = [batch + batch[-1:] * (BATCH - len(batch)) for batch in batches]
    loader = data.clean_dataloader([path for batch in full for path in batch], BATCH)
    for batch, loaded in zip(batches, loader, strict=True):
        assert module.backbone is not None
        yield batch, module.backbone(loaded["image"].to(module.device))
