"""From the scores and maps of evaluated images to tables of metrics, thresholds and curves per category.

All functions take `outputs`, the columns of a table with one row per image:
`categories` and `defects` [N] str ("good" is the defect of normal images), `paths` [N] str, `labels` [N] 0 or 1,
`scores` [N], `maps` and `masks`, sequences of N arrays [H_i, W_i], such as `image_store.ImageStore`.
`has_masks` {category: bool} names all categories, in order, and says whether pixel metrics can be computed.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomalib_lite.metrics.aupimo import BOUNDS, FEWEST_LEVELS, image_areas
from anomalib_lite.metrics.functional import (
    Metrics,
    image_curves,
    image_metrics,
    pixel_curves_of,
    pixel_metrics_of,
)
from anomalib_lite.metrics.names import overlap_key
from anomalib_lite.metrics.overlap import OVERLAP, overlap_counts, overlap_of
from anomalib_lite.metrics.vertices import Pixels, pixel_vertices

Outputs = dict[str, Any]
Thresholds = dict[str, dict[str, float]]  # of `thresholds`, per category
NAMES = ("auroc", "ap", "f1max")
HELD_OUT_TOO = " or of held-out ones, whichever is larger"
FEWEST_GOOD = 10  # test images, for a note on the share of them that is flagged


class Measured(NamedTuple):
    """What is measured of evaluated images.

    Attributes:
        per_category: {category: metrics}, with None where a metric can't be computed.
        per_defect: {category: {defect: metrics}}, a kind's images against the category's good ones.
        curves: points of the curves of `functional.image_curves` and `pixel_curves`, {"<category>/<curve>": float32
            [P]}; of categories with good and defective images.
        notes: the reasons why metrics can't be computed.
    """

    per_category: dict[str, Metrics]
    per_defect: dict[str, dict[str, dict[str, Any]]]
    curves: dict[str, np.ndarray]
    notes: list[str]


def measure_categories(
    outputs: Outputs, has_masks: dict[str, bool], fpr_limits: list[float], limits: Thresholds
) -> Measured:
    """All metrics and curves. The scores of a category's pixels are sorted once for all of them."""
    found = Measured({}, {}, {}, [])
    too_few: list[str] = []
    missing: dict[tuple[str, str], list[str]] = {}  # (metrics, reason): categories
    for category, masks in has_masks.items():
        rows = np.flatnonzero(outputs["categories"] == category)
        limit = limits.get(category, {}).get("pixel")
        kinds, each, curves = _measured(rows, outputs, masks, fpr_limits, limit)
        found.per_category[category] = each[0]
        found.per_defect[category] = {
            name: {"images": len(images)} | metrics
            for (name, images), metrics in zip(kinds.items(), each[1:], strict=True)
        }
        found.curves.update({f"{category}/{key}": points for key, points in curves.items()})
        for reason, keys in _reasons(category, rows, outputs, masks, each[0], too_few).items():
            missing.setdefault((", ".join(keys), reason), []).append(category)
        found.notes.extend(_without_defect(category, rows, outputs) if masks else [])
    found.notes[:0] = [f"{', '.join(of)}: {keys} can't be computed: {reason}" for (keys, reason), of in missing.items()]
    if too_few:
        fewest = f"{FEWEST_LEVELS / (BOUNDS[1] - BOUNDS[0]):,.0f}"
        found.notes.append(
            f"aupimo can't be computed: false positive rates from {BOUNDS[0]:g} to {BOUNDS[1]:g} need more than "
            f"{fewest} pixels in good test images: {', '.join(too_few)}"
        )
    return found


def _measured(
    rows: np.ndarray, outputs: Outputs, masks: bool, fpr_limits: list[float], threshold: float | None
) -> tuple[dict[str, np.ndarray], list[Metrics], dict[str, np.ndarray]]:
    """The kinds of defects with the positions of their images among the category's rows, the metrics of the category
    and of each kind, and the points of the category's curves.
    """
    labels, scores, defects = (outputs[name][rows] for name in ("labels", "scores", "defects"))
    names = dict.fromkeys(defects[labels == 1].tolist())
    kinds = {name: np.flatnonzero((labels == 1) & (defects == name)) for name in names}
    good = np.flatnonzero(labels != 1)
    sets = [np.arange(len(rows)), *(np.concatenate((good, images)) for images in kinds.values())]
    both = len(set(labels.tolist())) == 2
    curves = image_curves(scores, labels) if both else {}
    nothing: Metrics = dict.fromkeys(f"image_{name}" for name in NAMES)
    each = [image_metrics(scores[chosen], labels[chosen]) if len(rows) else nothing for chosen in sets]
    if masks and len(rows):
        pixels = Pixels(outputs["maps"], outputs["masks"], rows)
        found, points = _pixel_metrics(pixels, labels, [good, *kinds.values()], sets, fpr_limits, threshold)
        curves |= points if both and any(pixels.mask(i).any() for i in range(len(rows))) else {}
    else:
        keys = (*(f"pixel_{x}" for x in NAMES), *(overlap_key("aupro", x) for x in fpr_limits), "aupimo", *OVERLAP)
        found = [dict.fromkeys(keys) for _ in sets]
    return kinds, [image | pixel for image, pixel in zip(each, found, strict=True)], curves


def _pixel_metrics(
    pixels: Pixels,
    labels: np.ndarray,
    groups: list[np.ndarray],
    sets: list[np.ndarray],
    fpr_limits: list[float],
    threshold: float | None,
) -> tuple[list[Metrics], dict[str, np.ndarray]]:
    """Pixel metrics of each of the sets, and the points of the first one's curves.

    Args:
        groups: positions of the good images, and of each kind's. sets: positions of all images, and of each kind's with
            the good ones.
    """
    areas = image_areas(pixels, labels)
    counts = None if threshold is None else overlap_counts(pixels, threshold)
    found: list[Metrics] = []
    for vertices in pixel_vertices(pixels, groups):  # one after the other: each takes memory
        found.append(pixel_metrics_of(vertices, fpr_limits))
    curves = pixel_curves_of(vertices)
    found = [found[-1], *found[:-1]]  # all groups together come last
    for metrics, chosen in zip(found, sets, strict=True):
        own = [areas[i] for i in chosen.tolist() if i in areas]
        metrics["aupimo"] = math.fsum(own) / len(own) if own else None
        metrics |= {} if counts is None else overlap_of(counts[chosen].sum(0))
    return found, curves


def _reasons(
    category: str, rows: np.ndarray, outputs: Outputs, masks: bool, metrics: Metrics, too_few: list[str]
) -> dict[str, list[str]]:
    """{reason: metrics of a category that are missing for this reason}. A category where AUPIMO alone is missing is
    added to `too_few`.
    """
    labels = outputs["labels"][rows]
    missing = [key for key, value in metrics.items() if value is None]
    if "aupimo" in missing and "pixel_auroc" not in missing:
        missing.remove("aupimo")
        pixels = sum(outputs["masks"][i].size for i in rows if not outputs["labels"][i])
        too_few.append(f"{category} ({pixels:,})")
    absent = [name for label, name in enumerate(("good", "defective")) if label not in labels]
    no_images = f"no {' and no '.join(absent)} test images" if len(rows) else "no test images"
    of_pixels = "no ground truth masks" if 1 in labels else no_images
    if masks:
        some = any(outputs["masks"][i].any() for i in rows)
        of_pixels = f"the ground truth masks have no pixel {'without' if some else 'with'} a defect"
    reasons: dict[str, list[str]] = {}
    for key in missing:
        reasons.setdefault(no_images if key.startswith("image_") else of_pixels, []).append(key)
    return reasons


def _without_defect(category: str, rows: np.ndarray, outputs: Outputs) -> list[str]:
    """A note on defective images whose masks are empty."""
    empty = [i for i in rows if outputs["labels"][i] and not outputs["masks"][i].any()]
    first = Path(outputs["paths"][empty[0]]).name if empty else ""
    text = f"{category}: {len(empty)} defective images have no defective pixel in their masks, the first is {first}"
    return [text] if empty else []


def mean_metrics(metrics: dict[str, Metrics]) -> tuple[Metrics, list[str]]:
    """Unweighted mean over the categories that have the metric; one note on the means of fewer than all categories."""
    mean: Metrics = {}
    partial: dict[int, list[str]] = {}  # number of categories: metrics that so many have
    for key in next(iter(metrics.values())):
        values = [value for m in metrics.values() if (value := m[key]) is not None]
        mean[key] = float(np.mean(values)) if values else None
        if values and len(values) < len(metrics):
            partial.setdefault(len(values), []).append(key)
    parts = [f"{count} for {', '.join(keys)}" for count, keys in partial.items()]
    text = f"some means are not over all {len(metrics)} categories, but over those that have the metric: "
    return mean, [text + "; ".join(parts)] if parts else []


def thresholds(normal: dict[str, np.ndarray], quantile: float) -> dict[str, Any]:
    """Decision thresholds per category: the quantile over normal images of the image score and of the map's maximum.
    `background` is the median of the maps' medians, where the colours of heat maps begin.

    The pixels' threshold is a quantile of the maps' maxima. Above the 0.99 quantile of all normal pixels, 1 % of the
    pixels of good images would count as defective; above that of the maxima, only about 1 % of good images have such a
    pixel at all. This threshold is high, so IoU and Dice are below their maximum over all thresholds, which only
    labelled defects could find.

    A network can learn its training images so well that other normal images have higher scores. So where images are
    held out from training, the quantile over the held-out ones counts if it is larger.

    Args:
        normal: of normal images, all [N]: `categories`, `scores`, their maps' `map_max` and `map_median`, and bool
            `held_out`: not trained on.
    """
    chosen: Thresholds = {}
    for category in dict.fromkeys(normal["categories"].tolist()):
        mine, held_out = normal["categories"] == category, normal["held_out"]
        groups = [rows for rows in (mine & ~held_out, mine & held_out) if rows.any()]
        image, pixel = (
            max(float(np.quantile(normal[key][rows], quantile)) for rows in groups) for key in ("scores", "map_max")
        )
        background, trained = float(np.median(normal["map_median"][mine])), int((mine & ~held_out).sum())
        chosen[category] = {"image": image, "pixel": pixel, "background": background, "images": trained}
        if held_out.any():
            chosen[category]["held_out"] = int((mine & held_out).sum())
    source = "normal training images" + (HELD_OUT_TOO if normal["held_out"].any() else "")
    return {"quantile": quantile, "from": source, "per_category": chosen}


def decisions(outputs: Outputs, per_category_thresholds: Thresholds) -> dict[str, dict[str, float | None]]:
    """What the thresholds would have decided, per category: `defective_found` and `good_flagged`, as shares."""
    shares: dict[str, dict[str, float | None]] = {}
    for category, threshold in per_category_thresholds.items():
        rows = np.flatnonzero(outputs["categories"] == category)
        labels, above = outputs["labels"][rows], outputs["scores"][rows] > threshold["image"]
        shares[category] = {
            name: float(above[labels == label].mean()) if label in labels else None
            for name, label in (("defective_found", 1), ("good_flagged", 0))
        }
    return shares


def ranking_notes(
    outputs: Outputs, per_category: dict[str, Metrics], good_flagged: dict[str, float | None]
) -> list[str]:
    """Notes on categories whose good test images score like defective ones, or higher: a mean over categories hides it.

    An image AUROC is significantly below 0.5 if it lies more than 1.96 standard errors below. The standard error is
    that of a score that tells nothing (Mann–Whitney): sqrt((good + defective + 1) / (12 good defective)).

    Args:
        good_flagged: the share of the good test images whose score exceeds the image threshold, per category.
    """
    reversed_, flagged = [], []
    for category, metrics in per_category.items():
        labels = outputs["labels"][outputs["categories"] == category]
        defective = int(labels.sum())
        good, auroc, share = len(labels) - defective, metrics["image_auroc"], good_flagged.get(category)
        if auroc is not None and 0.5 - auroc > 1.96 * math.sqrt((good + defective + 1) / (12 * good * defective)):
            reversed_.append(f"{category} ({auroc:.3f})")
        if share is not None and good >= FEWEST_GOOD and share > 0.5:
            flagged.append(f"{category} ({round(share * good)} of {good})")
    cause = "probably the good test images differ from the training images, for example in camera, light or crop"
    texts = {
        "image AUROC is significantly below 0.5, so good test images have higher scores than defective ones; "
        f"{cause}, or labels or folders are exchanged": reversed_,
        f"most good test images lie above the image threshold; {cause}, or the network scores images that it was not "
        "trained on higher (data.val_fraction=0.1 holds images out, which then raise the threshold)": flagged,
    }
    return [f"{', '.join(names)}: {text}" for text, names in texts.items() if names]
