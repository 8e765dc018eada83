"""What is collected while a run is tested: scores, maps and masks of all ranks, in the order of the data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from anomalib_lite.data.samples import Sample
from anomalib_lite.metrics.gather import GatheredSamples
from anomalib_lite.paths import relative_path
from anomalib_lite.progress import ProgressBar

TEST, NORMAL, HELD_OUT = 0, 1, 2  # the loaders of a test run, in this order


class Evaluation(L.Callback):
    """Collects what `test_step` returns for the test set, the normal training images, and the held-out images."""

    def __init__(self) -> None:
        self.collected = {
            TEST: GatheredSamples("scores", "labels", "maps", "masks"),
            # the maximum of a normal map for the pixels' threshold, its median for the colours of heat maps
            NORMAL: GatheredSamples("scores", "labels", "map_max", "map_median"),
            HELD_OUT: GatheredSamples("scores", "labels", "maps", "masks"),
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
        finite = torch.stack([torch.isfinite(x).all() for x in maps])
        if not finite.all():
            raise ValueError(f"the anomaly map of {batch['path'][int(finite.int().argmin())]} is not finite")
        fields = {"scores": outputs["score"], "labels": batch["label"]}
        if dataloader_idx == NORMAL:
            fields["map_max"] = torch.stack([x.amax() for x in maps])
            fields["map_median"] = torch.stack([x.median() for x in maps])
        else:
            fields |= {"maps": maps, "masks": batch.get("gt_mask", batch["mask"])}
        self.collected[dataloader_idx].update(batch["index"], **fields)
        if self.bar:
            self.bar.step()

    def gather(self, samples: dict[int, list[Sample]], root: Path) -> dict[int, dict[str, Any]]:
        """After the test, the outputs of all ranks' images per loader, in the order of the loader's `samples`.

        Every rank must call it, also one without a batch, for which Lightning calls no hook.

        Returns:
            On rank 0, {loader: {column: values}} with the columns of `metrics.per_category`, of NORMAL `map_max` and
            `map_median` [N] instead of `maps` and `masks`; of loaders with samples and of TEST. Empty on other ranks.
        """
        if self.bar:
            self.bar.close()
        outputs: dict[int, dict[str, Any]] = {}
        for loader, collected in self.collected.items():
            gathered = collected.gather()
            if gathered is not None:
                outputs[loader] = columns(samples[loader], root) | gathered
        return outputs


def columns(samples: Sequence[Sample], root: Path) -> dict[str, np.ndarray]:
    """`paths` (below the data's root), `categories` and `defects` of samples, [N] str each."""
    paths = [relative_path(sample.path, root) for sample in samples]
    return {
        "paths": np.array(paths, dtype=str),
        "categories": np.array([sample.category for sample in samples], dtype=str),
        "defects": np.array([sample.defect for sample in samples], dtype=str),
    }
