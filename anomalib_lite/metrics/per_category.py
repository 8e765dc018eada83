"""From the scores and maps of evaluated images to tables of metrics, thresholds and curves per category.

All functions take `outputs`, the columns of a table with one row per image:
`categories` and `defects` [N] str ("good" is the defect of normal images), `paths` [N] str, `labels` [N] 0 or 1,
`scores` [N], `maps` and `masks`, lists of N arrays [H_i, W_i].
`has_masks` {category: bool} names all categories, in order, and says whether pixel metrics can be computed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.metrics.aupimo import BOUNDS, FEWEST_LEVELS, aupimo
from anomalib_lite.metrics.functional import Metrics, image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.names import overlap_key
from anomalib_lite.metrics.overlap import OVERLAP, overlap_metrics

Outputs = dict[str, Any]
Thresholds = dict[str, dict[str, float]]  # of `thresholds`, per category
NAMES = ("auroc", "ap", "f1max")


def category_metrics(
    outputs: Outputs, has_masks: dict[str, bool], fpr_limits: list[float], limits: Thresholds
) -> tuple[dict[str, Metrics], list[str]]:
    """{category: metrics}, and notes that give the reason where a metric could not be computed (None)."""
    metrics, notes, too_few = {}, [], []
    for category, masks in has_masks.items():
        rows = _rows(outputs, category)
        labels = outputs["labels"][rows]
        metrics[category] = _metrics(rows, outputs, masks, fpr_limits, _pixel_limit(limits, category))
        missing = [key for key, value in metrics[category].items() if value is None]
        if "aupimo" in missing and "pixel_auroc" not in missing:
            missing.remove("aupimo")
            pixels = sum(outputs["maps"][i].size for i in rows if not outputs["labels"][i])
            too_few.append(f"{category} ({pixels:,})")
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
    if too_few:
        fewest = f"{FEWEST_LEVELS / (BOUNDS[1] - BOUNDS[0]):,.0f}"
        notes.append(
            f"aupimo can't be computed: false positive rates from {BOUNDS[0]:g} to {BOUNDS[1]:g} need more than "
            f"{fewest} pixels in good test images: {', '.join(too_few)}"
        )
    return metrics, notes


def defect_metrics(
    outputs: Outputs, has_masks: dict[str, bool], fpr_limits: list[float], limits: Thresholds
) -> dict[str, dict[str, Metrics | dict[str, int]]]:
    """Metrics per kind of defect: {category: {defect: metrics}}, its images against the category's good ones."""
    found: dict[str, dict[str, Any]] = {category: {} for category in has_masks}
    for category, masks in has_masks.items():
        rows = _rows(outputs, category)
        defective = outputs["labels"][rows] == 1
        defects = outputs["defects"][rows]
        for defect in dict.fromkeys(defects[defective].tolist()):
            images = defective & (defects == defect)
            chosen = rows[images | ~defective]
            metrics = _metrics(chosen, outputs, masks, fpr_limits, _pixel_limit(limits, category))
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

    The pixels' threshold is a quantile of the maps' maxima. Above the 0.99 quantile of all normal pixels, 1 % of the
    pixels of good images would count as defective; above that of the maxima, only about 1 % of good images have such a
    pixel at all. This threshold is high, so IoU and Dice are below their maximum over all thresholds, which only
    labelled defects could find.

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


def decisions(outputs: Outputs, per_category_thresholds: Thresholds) -> dict[str, dict[str, float | None]]:
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


def _pixel_limit(limits: Thresholds, category: str) -> float | None:
    return limits.get(category, {}).get("pixel")


def _pixels(rows: np.ndarray, outputs: Outputs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [outputs["maps"][i] for i in rows], [outputs["masks"][i] for i in rows]


def _metrics(
    rows: np.ndarray, outputs: Outputs, masks: bool, fpr_limits: list[float], threshold: float | None
) -> Metrics:
    """Image and pixel metrics of some rows, with `None` where they can't be computed."""
    image: Metrics = dict.fromkeys(f"image_{name}" for name in NAMES)
    pixel: Metrics = dict.fromkeys(f"pixel_{name}" for name in NAMES)
    pixel |= dict.fromkeys([*(overlap_key("aupro", limit) for limit in fpr_limits), "aupimo", *OVERLAP])
    if len(rows):
        image = image_metrics(outputs["scores"][rows], outputs["labels"][rows])
    if len(rows) and masks:
        pixels = _pixels(rows, outputs)
        pixel = pixel_metrics(*pixels, tuple(fpr_limits)) | {"aupimo": aupimo(*pixels, outputs["labels"][rows])}
        pixel |= overlap_metrics(*pixels, threshold) if threshold is not None else {}
    return image | pixel
