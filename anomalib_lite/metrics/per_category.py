"""From the scores and maps of evaluated images to tables of metrics, thresholds and curves per category.

All functions take `outputs`, the columns of a table with one row per image:
`categories` and `defects` [N] str ("good" is the defect of normal images), `paths` [N] str, `labels` [N] 0 or 1,
`scores` [N], `maps` and `masks`, lists of N arrays [H_i, W_i].
`has_masks` {category: bool} names all categories, in order, and says whether pixel metrics can be computed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.metrics.functional import Metrics, image_curves, image_metrics, pixel_curves, pixel_metrics

Outputs = dict[str, Any]
NAMES = ("auroc", "ap", "f1max")


def category_metrics(
    outputs: Outputs, has_masks: dict[str, bool], fpr_limits: list[float]
) -> tuple[dict[str, Metrics], list[str]]:
    """{category: metrics}, and notes that give the reason where a metric could not be computed (None)."""
    metrics, notes = {}, []
    for category, masks in has_masks.items():
        rows = _rows(outputs, category)
        labels = outputs["labels"][rows]
        metrics[category] = _metrics(rows, outputs, masks, fpr_limits)
        missing = [key for key, value in metrics[category].items() if value is None]
        absent = [name for label, name in enumerate(("good", "defective")) if label not in labels]
        no_images = f"no {' and no '.join(absent)} test images" if len(rows) else "no test images"
        for is_image in (True, False):  # image metrics, pixel metrics
            keys = [key for key in missing if key.startswith("image_") == is_image]
            reason = no_images if is_image or 1 not in labels else "no ground truth masks"
            if not is_image and masks:
                some = any(outputs["masks"][i].any() for i in rows)
                reason = f"the ground truth masks have no pixel {'without' if some else 'with'} a defect"
            if keys:
                notes.append(f"{category}: {', '.join(keys)} can't be computed: {reason}")
        empty = [i for i in rows if masks and outputs["labels"][i] and not outputs["masks"][i].any()]
        if empty:
            notes.append(
                f"{category}: {len(empty)} defective images have no defective pixel in their masks, the first is "
                f"{Path(outputs['paths'][empty[0]]).name}"
            )
    return metrics, notes


def defect_metrics(
    outputs: Outputs, has_masks: dict[str, bool], fpr_limits: list[float]
) -> dict[str, dict[str, Metrics | dict[str, int]]]:
    """Metrics per kind of defect: {category: {defect: metrics}}, its images against the category's good ones."""
    found: dict[str, dict[str, Any]] = {category: {} for category in has_masks}
    for category, masks in has_masks.items():
        rows = _rows(outputs, category)
        defective = outputs["labels"][rows] == 1
        defects = outputs["defects"][rows]
        for defect in dict.fromkeys(defects[defective].tolist()):
            images = defective & (defects == defect)
            metrics = _metrics(rows[images | ~defective], outputs, masks, fpr_limits)
            found[category][defect] = {"images": int(images.sum())} | metrics
    return found


def mean_metrics(metrics: dict[str, Metrics]) -> tuple[Metrics, list[str]]:
    """Unweighted mean over the categories that have the metric; a note where some have not."""
    mean: Metrics = {}
    notes = []
    for key in next(iter(metrics.values())):
        values = [value for m in metrics.values() if (value := m[key]) is not None]
        mean[key] = float(np.mean(values)) if values else None
        if values and len(values) < len(metrics):
            notes.append(f"the mean {key} is over the {len(values)} of {len(metrics)} categories that have it")
    return mean, notes


def thresholds(normal: dict[str, np.ndarray], quantile: float) -> dict[str, Any]:
    """Decision thresholds per category: the quantile over normal images of the image score and of the map's maximum.
    `background` is the median of the maps' medians, where the colours of heat maps begin.

    Args:
        normal: of normal training images, all [N]: `categories`, `scores`, and their maps' `map_max` and `map_median`.
    """
    chosen = {}
    for category in dict.fromkeys(normal["categories"].tolist()):
        rows = _rows(normal, category)
        image, pixel = (float(np.quantile(normal[key][rows], quantile)) for key in ("scores", "map_max"))
        background = float(np.median(normal["map_median"][rows]))
        chosen[category] = {"image": image, "pixel": pixel, "background": background, "images": len(rows)}
    return {"quantile": quantile, "from": "normal training images", "per_category": chosen}


def decisions(
    outputs: Outputs, per_category_thresholds: dict[str, dict[str, float]]
) -> dict[str, dict[str, float | None]]:
    """What the thresholds would have decided, per category: `defective_found` and `good_flagged`, as shares."""
    shares: dict[str, dict[str, float | None]] = {}
    for category, threshold in per_category_thresholds.items():
        rows = _rows(outputs, category)
        labels, above = outputs["labels"][rows], outputs["scores"][rows] > threshold["image"]
        shares[category] = {
            name: float(above[labels == label].mean()) if label in labels else None
            for name, label in (("defective_found", 1), ("good_flagged", 0))
        }
    return shares


def curves(outputs: Outputs, has_masks: dict[str, bool]) -> dict[str, np.ndarray]:
    """Points of the curves of `functional.image_curves` and `pixel_curves`, {"<category>/<curve>": float32 [P]};
    of categories with good and defective images.
    """
    points: dict[str, np.ndarray] = {}
    for category, masks in has_masks.items():
        rows = _rows(outputs, category)
        if len(set(outputs["labels"][rows].tolist())) == 2:
            found = image_curves(outputs["scores"][rows], outputs["labels"][rows])
            if masks and any(outputs["masks"][i].any() for i in rows):
                found |= pixel_curves(*_pixels(rows, outputs))
            points |= {f"{category}/{key}": value for key, value in found.items()}
    return points


def _rows(outputs: Outputs, category: str) -> np.ndarray:
    return np.flatnonzero(outputs["categories"] == category)


def _pixels(rows: np.ndarray, outputs: Outputs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [outputs["maps"][i] for i in rows], [outputs["masks"][i] for i in rows]


def _metrics(rows: np.ndarray, outputs: Outputs, masks: bool, fpr_limits: list[float]) -> Metrics:
    """Image and pixel metrics of some rows, with `None` where they can't be computed."""
    image: Metrics = dict.fromkeys(f"image_{name}" for name in NAMES)
    pixel: Metrics = dict.fromkeys(f"pixel_{name}" for name in NAMES)
    pixel |= dict.fromkeys(f"aupro_{round(100 * limit):02d}" for limit in fpr_limits)
    if len(rows):
        image = image_metrics(outputs["scores"][rows], outputs["labels"][rows])
        pixel = pixel_metrics(*_pixels(rows, outputs), tuple(fpr_limits)) if masks else pixel
    return image | pixel
