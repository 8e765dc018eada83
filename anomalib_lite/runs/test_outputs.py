"""From maps and scores to metrics per category: collected over batches and ranks, computed once on rank 0."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from anomalib_lite.data.samples import Sample
from anomalib_lite.metrics.functional import Metrics, image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.gather import ImageMetrics, PixelMetrics
from anomalib_lite.progress import ProgressBar

TEST, NORMAL, HELD_OUT = 0, 1, 2  # the loaders of a test run, in this order


class Evaluation(L.Callback):
    """Collects what `test_step` gives, for the test set, the normal training images, and the held-out images.

    `ragged`: maps and masks may differ in size, and are held as lists.
    """

    def __init__(self, ragged: bool = False) -> None:
        self.image = {part: ImageMetrics() for part in (TEST, NORMAL, HELD_OUT)}
        self.pixel = {part: PixelMetrics(ragged=ragged) for part in (TEST, HELD_OUT)}
        # of normal images: the map's maximum, for the pixels' threshold, and its median, where heat maps begin
        self.peak, self.median = ImageMetrics(), ImageMetrics()
        self.arrays: dict[int, dict[str, Any]] = {}
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
        maps: Tensor | list[Tensor] = outputs["map"]
        finite = torch.stack([torch.isfinite(x).all() for x in maps])
        if not finite.all():
            raise ValueError(f"the anomaly map of {batch['path'][int(finite.int().argmin())]} is not finite")
        self.image[dataloader_idx].update(outputs["score"], batch["label"], batch["index"])
        if dataloader_idx == NORMAL:
            self.peak.update(torch.stack([x.amax() for x in maps]), batch["label"], batch["index"])
            self.median.update(torch.stack([x.median() for x in maps]), batch["label"], batch["index"])
        else:
            truth = batch["gt_mask"] if "gt_mask" in batch else batch["mask"]
            if isinstance(maps, Tensor) and not isinstance(truth, Tensor):
                truth = torch.stack(truth)
            self.pixel[dataloader_idx].update(maps, truth, batch["index"])
        if self.bar:
            self.bar.step()

    def gather(self) -> None:
        """After the test: on rank 0, `arrays[part]` then holds all ranks' scores, labels, maps, masks and peaks in the
        data set's order. Every rank calls it, also one without a batch, for which Lightning calls no hook.
        """
        if self.bar:
            self.bar.close()
        for part, state in self.image.items():
            if part == NORMAL:
                more = [("peaks", self.peak.gathered()), ("medians", self.median.gathered())]
                fields = {name: gathered["scores"] for name, gathered in more if gathered}
            else:
                fields = self.pixel[part].gathered() or {}
            gathered = state.gathered()
            if gathered is not None:
                self.arrays[part] = gathered | fields


def category_metrics(
    samples: list[Sample],
    categories: list[str],
    arrays: dict[str, Any],
    has_masks: dict[str, bool],
    limits: list[float],
) -> tuple[dict[str, Metrics], list[str]]:
    """Metrics per category, and why some could not be computed."""
    metrics, notes = {}, []
    for category in categories:
        rows = np.array([sample.category == category for sample in samples], dtype=bool)
        metrics[category] = _metrics(rows, arrays, has_masks[category], limits)
        missing = [key for key, value in metrics[category].items() if value is None]
        if missing:
            labels = arrays["labels"][rows]
            why = [name for name, there in (("good", (labels == 0).any()), ("defective", labels.any())) if not there]
            reason = f"no {' and no '.join(why)} test images" if why else "no ground truth masks"
            reason = reason if rows.any() else "no test images"
            notes.append(f"{category}: {', '.join(missing)} can't be computed: {reason}")
        if has_masks[category]:
            at = [i for i in np.flatnonzero(rows) if arrays["labels"][i] and not np.any(arrays["masks"][i])]
            if at:
                notes.append(
                    f"{category}: {len(at)} defective images have no defective pixel in their masks, the first is "
                    f"{samples[at[0]].path.name}"
                )
    return metrics, notes


def defect_metrics(
    samples: list[Sample],
    categories: list[str],
    arrays: dict[str, Any],
    has_masks: dict[str, bool],
    limits: list[float],
) -> dict[str, dict[str, Metrics | dict[str, int]]]:
    """Metrics per kind of defect: {category: {defect: metrics}}, its images against the category's good ones."""
    found: dict[str, dict[str, Any]] = {category: {} for category in categories}
    of = np.array([(sample.category, sample.defect) for sample in samples]).reshape(-1, 2)
    for category, defect in dict.fromkeys(map(tuple, of.tolist())):
        mine, good = of[:, 0] == category, arrays["labels"] == 0
        rows = mine & (good | (of[:, 1] == defect))
        if arrays["labels"][mine & (of[:, 1] == defect)].any():
            metrics = _metrics(rows, arrays, has_masks[category], limits)
            found[category][defect] = {"images": int((rows & ~good).sum())} | metrics
    return found


def _pixels(rows: np.ndarray, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """The maps and masks of some rows: arrays, or lists where they differ in size."""
    maps, masks = arrays["maps"], arrays["masks"]
    if isinstance(maps, np.ndarray):
        return maps[rows], masks[rows]
    return [maps[i] for i in np.flatnonzero(rows)], [masks[i] for i in np.flatnonzero(rows)]


def _metrics(rows: np.ndarray, arrays: dict[str, Any], masks: bool, limits: list[float]) -> Metrics:
    if rows.any():
        image = image_metrics(arrays["scores"][rows], arrays["labels"][rows])
    else:
        image = dict.fromkeys(("image_auroc", "image_ap", "image_f1max"))
    if rows.any() and masks:
        return image | pixel_metrics(*_pixels(rows, arrays), tuple(limits))
    pixel = ("pixel_auroc", "pixel_ap", "pixel_f1max", *(f"aupro_{round(100 * limit):02d}" for limit in limits))
    return image | dict.fromkeys(pixel)


def mean_metrics(metrics: dict[str, Metrics]) -> tuple[dict[str, float | None], list[str]]:
    """Unweighted mean over the categories that have the metric; a note where some have not."""
    mean: dict[str, float | None] = {}
    notes = []
    for key in next(iter(metrics.values())):
        values = [m[key] for m in metrics.values() if m[key] is not None]
        mean[key] = float(np.mean(values)) if values else None  # type: ignore[arg-type]
        if values and len(values) < len(metrics):
            notes.append(f"the mean {key} is over the {len(values)} of {len(metrics)} categories that have it")
    return mean, notes


def thresholds(normal: dict[str, np.ndarray], quantile: float) -> dict[str, Any]:
    """Decision thresholds per category: the quantile over normal images of the image score and of the map's maximum.

    Args:
        normal: per image `scores`, `peaks` and `medians` of its map, and `categories`, all [N].
    """
    chosen = {}
    for category in dict.fromkeys(normal["categories"].tolist()):
        rows = normal["categories"] == category
        image, pixel = (
            float(np.quantile(normal[key][rows].astype(np.float64), quantile)) for key in ("scores", "peaks")
        )
        background = float(np.median(normal["medians"][rows]))
        chosen[category] = {"image": image, "pixel": pixel, "background": background, "images": int(rows.sum())}
    return {"quantile": quantile, "from": "normal training images", "per_category": chosen}


def decisions(
    samples: list[Sample], arrays: dict[str, np.ndarray], limits: dict[str, dict[str, float]]
) -> dict[str, dict[str, float | None]]:
    """What the thresholds would have decided, per category: `defective_found` and `good_flagged`, as shares."""
    of = np.array([sample.category for sample in samples], dtype=object)
    told: dict[str, dict[str, float | None]] = {}
    for category, threshold in limits.items():
        above = arrays["scores"] > threshold["image"]
        told[category] = {}
        for name, label in (("defective_found", 1), ("good_flagged", 0)):
            rows = (of == category) & (arrays["labels"] == label)
            told[category][name] = float(above[rows].mean()) if rows.any() else None
    return told


def curves(
    samples: list[Sample], categories: list[str], arrays: dict[str, Any], has_masks: dict[str, bool]
) -> dict[str, np.ndarray]:
    """Points of the curves per category, keys `<category>/<curve>`."""
    of = np.array([sample.category for sample in samples])
    points: dict[str, np.ndarray] = {}
    for category in categories:
        rows = of == category
        labels = arrays["labels"][rows]
        if labels.any() and not labels.all():
            found = image_curves(arrays["scores"][rows], labels)
            maps, masks = _pixels(rows, arrays)
            if has_masks[category] and any(mask.any() for mask in masks):
                found |= pixel_curves(maps, masks)
            points |= {f"{category}/{key}": value for key, value in found.items()}
    return points
