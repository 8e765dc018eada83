"""What is collected while a run is tested: scores, maps and masks of all ranks, in the order of the data set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from anomalib_lite.console import ProgressBar
from anomalib_lite.data.dataset import THRESHOLDS
from anomalib_lite.data.samples import Sample
from anomalib_lite.metrics.gather import GatheredSamples
from anomalib_lite.paths import relative_path

TEST, NORMAL, HELD_OUT = 0, 1, 2  # the loaders of a test run, in this order


class Evaluation(L.Callback):
    """Collects what `test_step` returns for the test set, the normal training images, and the held-out images.

    Args:
        folder: where maps lie that do not fit into memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.collected = {
            TEST: GatheredSamples("scores", "labels", "maps", "masks", folder=folder),
            # the maximum of a normal map for the pixels' threshold, its median for the colours of heat maps
            NORMAL: GatheredSamples("scores", "labels", "map_max", "map_median"),
            HELD_OUT: GatheredSamples("scores", "labels", "maps", "masks", "map_max", "map_median", folder=folder),
        }
        self.bar: ProgressBar | None = None

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = ProgressBar("testing", sum(int(n) for n in trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        maps = outputs["map"]  # [B, H, W], or a list of B maps [H_i, W_i]
        numbers = {"index": batch["index"], "labels": batch["label"], "scores": outputs["score"]}
        numbers["finite"] = per_image(lambda x: torch.isfinite(x).all(1), maps) & torch.isfinite(outputs["score"])
        if dataloader_idx != TEST:
            numbers["map_max"] = per_image(lambda x: x.amax(1), maps)
            numbers["map_median"] = per_image(median, maps)
        # one copy from the device for all numbers; float64 holds them exactly
        fields: dict[str, Any] = dict(
            zip(numbers, torch.stack([x.double() for x in numbers.values()]).cpu(), strict=True)
        )
        if not fields["finite"].all():
            raise ValueError(
                f"the anomaly map or score of {batch['path'][int(fields['finite'].argmin())]} is not finite"
            )
        if dataloader_idx != NORMAL:
            fields |= {"maps": maps, "masks": batch.get("gt_mask", batch["mask"])}
        self.collected[dataloader_idx].update(fields.pop("index").long(), **fields)
        if self.bar:
            self.bar.step()

    def gather(self, samples: dict[int, list[Sample]], root: Path) -> dict[int, dict[str, Any]]:
        """After the test, the outputs of all ranks' images per loader, in the order of the loader's `samples`.

        Every rank must call it, also one without a batch, for which Lightning calls no hook.

        Returns:
            On rank 0, {loader: {column: values}} of loaders with samples and of TEST, with the columns of
            `metrics.per_category`. NORMAL has `map_max` and `map_median` [N] instead of `maps` and `masks`; HELD_OUT
            has all four. Empty on other ranks.
        """
        if self.bar:
            self.bar.close()
        outputs: dict[int, dict[str, Any]] = {}
        for loader, collected in self.collected.items():
            gathered = collected.gather()
            if gathered is not None:
                outputs[loader] = columns(samples[loader], root) | gathered
        return outputs


def scored_for_thresholds(samples: Sequence[Sample], limit: int | None, seed: int) -> list[int]:
    """Positions of the training images that are scored for the thresholds: all, or where a category has more normal
    images than scoring.threshold_images, so many of these, drawn by the seed. A 0.99 quantile needs no more than some
    thousands.
    """
    normal: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        if not sample.label:
            normal.setdefault(sample.category, []).append(i)
    if limit is None or all(len(positions) <= limit for positions in normal.values()):
        return list(range(len(samples)))
    chosen: list[int] = []
    for category, positions in normal.items():
        rng = np.random.default_rng([seed, THRESHOLDS, *category.encode()])
        chosen += rng.permutation(positions)[:limit].tolist() if len(positions) > limit else positions
    return sorted(chosen)


def per_image(statistic: Callable[[Tensor], Tensor], maps: Tensor | list[Tensor]) -> Tensor:
    """A statistic of each map, [B]: maps [B, H, W], or B maps [H_i, W_i]. `statistic`: [n, H·W] -> [n]."""
    return (
        statistic(maps.flatten(1)) if isinstance(maps, Tensor) else torch.cat([statistic(x.view(1, -1)) for x in maps])
    )


def median(maps: Tensor) -> Tensor:
    """The lower median of each row of [n, H·W], [n]. PyTorch's own has no deterministic form on a GPU."""
    return maps.sort(1).values[:, (maps.shape[1] - 1) // 2] if maps.is_cuda else maps.median(1).values


def columns(samples: Sequence[Sample], root: Path) -> dict[str, np.ndarray]:
    """`paths` (below the data's root), `categories` and `defects` of samples, [N] str each."""
    paths = [relative_path(sample.path, root) for sample in samples]
    return {
        "paths": np.array(paths, dtype=str),
        "categories": np.array([sample.category for sample in samples], dtype=str),
        "defects": np.array([sample.defect for sample in samples], dtype=str),
    }
