"""Exact metrics of anomaly detection as pure functions on NumPy arrays.

Scores may have any scale: only their order counts, and a strictly increasing transform changes no bit of a result.
Every distinct score is a threshold and tied scores are one vertex of every curve. The order of the images changes no
bit either.
"""

from collections.abc import Sequence

import numpy as np

from anomalib_lite.metrics.names import overlap_key
from anomalib_lite.metrics.vertices import Array, Images, Pixels, Vertices, image_vertices, pixel_vertices

Metrics = dict[str, float | None]

_POINTS = 200  # approximate maximum per curve


def image_metrics(scores: Array, labels: Array) -> Metrics:
    """AUROC, AP and F1-max from one score per image.

    Args:
        scores: [N], higher is more anomalous, any real dtype (float16 counts as float32).
        labels: [N], 1 or True for anomalous.

    Returns:
        `image_auroc`, `image_ap`, `image_f1max` as fractions; all None where only one class is present.

    Raises:
        ValueError: scores that are not finite, labels other than 0 and 1, shapes that do not fit, no image at all.
    """
    return _ranking("image", image_vertices(scores, labels))


def pixel_metrics(maps: Images, masks: Images, fpr_limits: Sequence[float] = (0.3, 0.05)) -> Metrics:
    """AUROC, AP and F1-max over all pixels, and AUPRO (Bergmann et al., IJCV 2021) at each limit.

    PRO is the mean, over the 8-connected components of all masks, of the share of a component that is found. AUPRO is
    its integral over the false positive rate of all normal pixels, from 0 to the limit, divided by the limit.

    Args:
        maps: [N, H, W], higher is more anomalous, any real dtype (float16 counts as float32); or a sequence of N maps
            [H_i, W_i], all pixels of which count alike.
        masks: as the maps, any nonzero pixel is anomalous. An empty mask adds no component.
        fpr_limits: in (0, 1]; `names.overlap_key` gives the key of each, `aupro_30` for 0.3.

    Returns:
        `pixel_auroc`, `pixel_ap`, `pixel_f1max`, `aupro_*` as fractions; all None where only one class is present.

    Raises:
        ValueError: maps that are not finite, shapes that do not fit, no pixel at all, limits outside (0, 1].
    """
    if not all(0 < limit <= 1 for limit in fpr_limits):
        raise ValueError(f"fpr_limits must lie in (0, 1], got {tuple(fpr_limits)}")
    (vertices,) = pixel_vertices(Pixels(maps, masks))
    return pixel_metrics_of(vertices, fpr_limits)


def pixel_metrics_of(vertices: Vertices | None, fpr_limits: Sequence[float]) -> Metrics:
    """The result of `pixel_metrics` from the vertices of its pixels."""
    aupro = {overlap_key("aupro", limit): area_up_to(vertices, limit) if vertices else None for limit in fpr_limits}
    return _ranking("pixel", vertices) | aupro


def image_curves(scores: Array, labels: Array) -> dict[str, Array]:
    """At most about 200 points of each curve as float32: `image_fpr`, `image_tpr`, `image_precision`, `image_recall`.

    The precision holds for the step that ends at its recall. Arguments and errors as in `image_metrics`; empty arrays
    where only one class is present.
    """
    return _curves("image", image_vertices(scores, labels))


def pixel_curves(maps: Images, masks: Images) -> dict[str, Array]:
    """As `image_curves`, over pixels (`pixel_fpr`, ...), and the PRO curve over its own rates: `pro_fpr`, `pro`.

    Arguments and errors as in `pixel_metrics`.
    """
    (vertices,) = pixel_vertices(Pixels(maps, masks))
    return pixel_curves_of(vertices)


def pixel_curves_of(vertices: Vertices | None) -> dict[str, Array]:
    """The result of `pixel_curves` from the vertices of its pixels."""
    fpr, pro = _polyline(vertices, vertices.pro) if vertices else (np.empty(0), np.empty(0))
    return _curves("pixel", vertices) | {"pro_fpr": fpr.astype(np.float32), "pro": pro.astype(np.float32)}


def _ranking(prefix: str, v: Vertices | None) -> Metrics:
    if v is None:
        return {f"{prefix}_{name}": None for name in ("auroc", "ap", "f1max")}
    positives = int(v.tp[-1])
    found = np.diff(v.tp, prepend=0)
    # Mann-Whitney in integers: a positive wins against negatives below it and half against tied ones
    lost = int((found * v.fp).sum()) + int((found * v.fp_before).sum())
    pairs = 2 * positives * v.negatives
    # a threshold between two positives adds only negatives: it can't be the best, nor does recall (and AP) step there
    return {
        f"{prefix}_auroc": (pairs - lost) / pairs,
        f"{prefix}_ap": float((found * (v.tp / (v.tp + v.fp))).sum() / positives),
        f"{prefix}_f1max": float((2 * v.tp / (v.tp + v.fp + positives)).max()),
    }


def area_up_to(v: Vertices, limit: float) -> float:
    """The area under `pro` over the false positive rate, from 0 to the limit, divided by the limit."""
    end = limit * v.negatives
    n = int(np.searchsorted(v.fp, end)) + 1  # segments that start beyond the limit add nothing
    fp, before, pro = v.fp[:n].astype(float), v.fp_before[:n].astype(float), v.pro[:n]
    pro_before, fp_last = (np.concatenate(([0.0], a[:-1])) for a in (pro, fp))
    level = pro_before * np.maximum(np.minimum(before, end) - fp_last, 0)
    run = np.maximum(np.minimum(fp, end) - before, 0)  # the part of the tied, straight line within the limit
    slope = (pro - pro_before) / np.maximum(fp - before, 1)
    area = level.sum() + (run * (pro_before + 0.5 * slope * run)).sum() + pro[-1] * max(end - fp[-1], 0.0)
    return min(float(area / end), 1.0)


def _curves(prefix: str, v: Vertices | None) -> dict[str, Array]:
    if v is None:
        return {f"{prefix}_{name}": np.empty(0, np.float32) for name in ("fpr", "tpr", "precision", "recall")}
    tpr = v.tp / v.tp[-1]
    x, y = _polyline(v, tpr)
    keep = np.unique(np.searchsorted(tpr, np.linspace(0, 1, _POINTS)))
    precision = np.concatenate(([1.0], v.tp[keep] / (v.tp[keep] + v.fp[keep])))  # scikit-learn's start: (0, 1)
    curves = {"fpr": x, "tpr": y, "precision": precision, "recall": np.concatenate(([0.0], tpr[keep]))}
    return {f"{prefix}_{name}": points.astype(np.float32) for name, points in curves.items()}


def _polyline(v: Vertices, value: Array) -> tuple[Array, Array]:
    """Points of `value` [V] over the false positive rate, from (0, 0) to (1, 1), spread evenly along the curve."""
    way = v.fp / v.negatives + value
    keep = np.unique(np.searchsorted(way, np.linspace(0, way[-1], _POINTS // 3)))
    # three points per step: the end of the last step, of its horizontal part, and of its tied part
    fp, reached = (np.where(keep > 0, a[keep - 1], 0) for a in (v.fp, value))
    x = np.stack((fp, v.fp_before[keep], v.fp[keep]), axis=1).ravel() / v.negatives
    y = np.stack((reached, reached, value[keep]), axis=1).ravel()
    x, y = np.concatenate((x, [1.0])), np.concatenate((y, [1.0]))
    new = np.concatenate(([True], (np.diff(x) > 0) | (np.diff(y) > 0)))
    return x[new], y[new]
