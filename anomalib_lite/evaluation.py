"""From maps and scores to metrics per category: collected over batches and ranks, computed once on rank 0."""

import time
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from anomalib_lite.callbacks import Bar
from anomalib_lite.data.samples import Sample
from anomalib_lite.metrics.functional import image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.states import ImageMetrics, PixelMetrics

TEST, NORMAL, HELD_OUT = 0, 1, 2  # the loaders of a test run, in this order


class Evaluation(L.Callback):
    """Collects what `test_step` gives, for the test set, the normal training images, and the held-out images."""

    def __init__(self) -> None:
        self.image = {part: ImageMetrics() for part in (TEST, NORMAL, HELD_OUT)}
        self.pixel = {part: PixelMetrics() for part in (TEST, HELD_OUT)}
        self.pixel_peak = ImageMetrics()  # of normal images: the map's maximum, for the pixels' threshold
        self.arrays: dict[int, dict[str, np.ndarray]] = {}
        self.seconds = {TEST: 0.0, NORMAL: 0.0, HELD_OUT: 0.0}
        self.bar: Bar | None = None

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = Bar("testing", sum(int(n) for n in trainer.num_test_batches))

    def on_test_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.start = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        maps: Tensor = outputs["map"]
        if not torch.isfinite(maps).all():
            bad = [path for path, x in zip(batch["path"], maps, strict=True) if not torch.isfinite(x).all()]
            raise ValueError(f"the anomaly map of {bad[0]} is not finite")
        self.image[dataloader_idx].update(outputs["score"], batch["label"], batch["index"])
        if dataloader_idx == NORMAL:
            self.pixel_peak.update(maps.amax((1, 2)), batch["label"], batch["index"])
        else:
            self.pixel[dataloader_idx].update(maps, batch["mask"], batch["index"])
        self.seconds[dataloader_idx] += time.perf_counter() - self.start
        if self.bar:
            self.bar.step()

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """On rank 0, `arrays[part]` holds all ranks' scores, labels, maps, masks and peaks in the data set's order."""
        if self.bar:
            self.bar.close()
        for part, state in self.image.items():
            gathered = state.gathered()
            more = self.pixel_peak.gathered() if part == NORMAL else self.pixel[part].gathered()
            if gathered is None or more is None:
                continue
            if part == NORMAL:
                self.arrays[part] = gathered | {"peaks": more["scores"]}
            else:
                self.arrays[part] = gathered | more


def category_metrics(
    samples: list[Sample],
    categories: list[str],
    arrays: dict[str, np.ndarray],
    has_masks: dict[str, bool],
    limits: list[float],
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """Metrics per category, and why some could not be computed."""
    metrics, notes = {}, []
    of = np.array([categories.index(sample.category) for sample in samples], dtype=int)
    for number, category in enumerate(categories):
        rows = of == number
        result: dict[str, float | None] = {}
        labels = arrays["labels"][rows]
        empty = [] if rows.any() else ["no test images"]
        if rows.any():
            result |= image_metrics(arrays["scores"][rows], labels)
            empty += (
                ["no good test images"] if labels.all() else ["no defective test images"] if not labels.any() else []
            )
        else:
            result |= dict.fromkeys(("image_auroc", "image_ap", "image_f1max"))
        if rows.any() and has_masks[category]:
            result |= pixel_metrics(arrays["maps"][rows], arrays["masks"][rows], tuple(limits))
        else:
            result |= dict.fromkeys(
                ("pixel_auroc", "pixel_ap", "pixel_f1max", *(f"aupro_{round(100 * x):02d}" for x in limits))
            )
            empty += ["no ground truth masks"] if rows.any() else []
        missing = [key for key, value in result.items() if value is None]
        if missing:
            why = " and ".join(empty) or "too few pixels of a kind"
            notes.append(f"{category}: {', '.join(missing)} can't be computed: {why}")
        metrics[category] = result
    return metrics, notes


def mean_metrics(metrics: dict[str, dict[str, float | None]]) -> tuple[dict[str, float | None], list[str]]:
    """Unweighted mean over the categories that have the metric; a note where some have not."""
    mean: dict[str, float | None] = {}
    notes = []
    for key in next(iter(metrics.values())):
        values = [m[key] for m in metrics.values() if m[key] is not None]
        mean[key] = float(np.mean(values)) if values else None  # type: ignore[arg-type]
        if values and len(values) < len(metrics):
            notes.append(f"the mean {key} is over the {len(values)} of {len(metrics)} categories that have it")
    return mean, notes


def thresholds(
    samples: list[Sample], categories: list[str], arrays: dict[str, np.ndarray], quantile: float
) -> dict[str, Any]:
    """Decision thresholds per category: the quantile over normal images of the image score and of the map's maximum."""
    of = np.array([sample.category for sample in samples])
    chosen = {}
    for category in categories:
        rows = of == category
        image, peak = (
            float(np.quantile(arrays[key][rows].astype(np.float64), quantile)) for key in ("scores", "peaks")
        )
        chosen[category] = {"image": image, "pixel": peak, "images": int(rows.sum())}
    return {"quantile": quantile, "from": "normal training images", "per_category": chosen}


def curves(
    samples: list[Sample], categories: list[str], arrays: dict[str, np.ndarray], has_masks: dict[str, bool]
) -> dict[str, np.ndarray]:
    """Points of the curves per category, keys `<category>/<curve>`."""
    of = np.array([sample.category for sample in samples])
    points: dict[str, np.ndarray] = {}
    for category in categories:
        rows = of == category
        labels = arrays["labels"][rows]
        if labels.any() and not labels.all():
            found = image_curves(arrays["scores"][rows], labels)
            if has_masks[category] and arrays["masks"][rows].any():
                found |= pixel_curves(arrays["maps"][rows], arrays["masks"][rows])
            points |= {f"{category}/{key}": value for key, value in found.items()}
    return points
