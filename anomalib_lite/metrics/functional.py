"""Exact metrics of anomaly detection as pure functions on NumPy arrays.

Scores may have any scale: only their order counts, and a strictly increasing transform changes no bit of a result.
Every distinct score is a threshold and tied scores are one vertex of every curve. The order of the images changes no
bit either.

Algorithm: the curves bend only at the scores of positives, which are few. The negatives are sorted by value (NumPy >= 2
does that with SIMD, but not an argsort), and two binary searches count those above each distinct positive score.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_lite.metrics.names import overlap_key

Array = NDArray[Any]
Images = Array | list[Array]  # of one shape, or a list of 2-D arrays
Metrics = dict[str, float | None]

_THREADS = 2  # each sorts its own part of the negatives; the counts add up to the same integers for any number
_CHUNK = 1 << 20  # thresholds that one task of a thread looks up; limits the size of temporaries
_POINTS = 200  # approximate maximum per curve


class Vertices(NamedTuple):
    """Counts at each distinct score of a positive, from the highest to the lowest score, all [V].

    Between two of them only negatives pass the threshold, so the curves run horizontally from (`fp`, value) to the next
    (`fp_before`, value); from there to the next (`fp`, next value) positives and negatives are tied: a straight line.
    """

    tp: Array  # int64, positives with a score >= the threshold; the last is the number of positives
    fp: Array  # int64, negatives with a score >= the threshold
    fp_before: Array  # int64, negatives with a score > the threshold
    pro: Array  # float64, mean share of each component with a score >= the threshold; the last is 1
    negatives: int


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
    return _ranking("image", _image_vertices(scores, labels))


def pixel_metrics(maps: Images, masks: Images, fpr_limits: Sequence[float] = (0.3, 0.05)) -> Metrics:
    """AUROC, AP and F1-max over all pixels, and AUPRO (Bergmann et al., IJCV 2021) at each limit.

    PRO is the mean, over the 8-connected components of all masks, of the share of a component that is found. AUPRO is
    its integral over the false positive rate of all normal pixels, from 0 to the limit, divided by the limit.

    Args:
        maps: [N, H, W], higher is more anomalous, any real dtype (float16 counts as float32); or a list of N maps
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
    vertices = _pixel_vertices(maps, masks)
    aupro = {overlap_key("aupro", limit): area_up_to(vertices, limit) if vertices else None for limit in fpr_limits}
    return _ranking("pixel", vertices) | aupro


def image_curves(scores: Array, labels: Array) -> dict[str, Array]:
    """At most about 200 points of each curve as float32: `image_fpr`, `image_tpr`, `image_precision`, `image_recall`.

    The precision holds for the step that ends at its recall. Arguments and errors as in `image_metrics`; empty arrays
    where only one class is present.
    """
    return _curves("image", _image_vertices(scores, labels))


def pixel_curves(maps: Images, masks: Images) -> dict[str, Array]:
    """As `image_curves`, over pixels (`pixel_fpr`, ...), and the PRO curve over its own rates: `pro_fpr`, `pro`.

    Arguments and errors as in `pixel_metrics`.
    """
    vertices = _pixel_vertices(maps, masks)
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


def _image_vertices(scores: Array, labels: Array) -> Vertices | None:
    scores, labels = _checked("scores", scores, "labels", labels, "[N]")
    anomalous = labels == 1
    if not (anomalous | (labels == 0)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels[~anomalous & (labels != 0)])[:5]}")
    scores = scores.astype(np.result_type(scores.dtype, np.float32))
    return _vertices([np.sort(scores[~anomalous])], scores[anomalous], np.ones(anomalous.sum(), np.int32))


def _pixel_vertices(maps: Images, masks: Images) -> Vertices | None:
    maps, masks = checked_images(maps, masks)
    dtype = np.result_type(np.float32, *{amap.dtype for amap in maps})
    bounds = [len(maps) * i // _THREADS for i in range(_THREADS + 1)]
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda a, b: _split(maps[a:b], masks[a:b], dtype), bounds[:-1], bounds[1:])
    negatives, scores, areas = zip(*parts, strict=True)
    return _vertices(negatives, np.concatenate(scores), np.concatenate(areas))


def _split(maps: Images, masks: Images, dtype: Any) -> tuple[Array, Array, Array]:
    """The sorted scores of the negatives; for each positive its score and the area of its component in pixels."""
    negatives = np.empty(sum(mask.size - np.count_nonzero(mask) for mask in masks), dtype)
    scores, areas = [np.empty(0, dtype)], [np.empty(0, np.int32)]
    end = 0
    for amap, mask in zip(maps, masks, strict=True):
        normal = np.equal(mask, 0, order="C")
        below = amap.ravel() if normal.all() else amap[normal]
        negatives[end : end + len(below)] = below
        end += len(below)
        if len(below) < amap.size:
            defect = ~normal
            _, label, stats, _ = cv2.connectedComponentsWithStats(defect.view(np.uint8), connectivity=8)
            scores.append(amap[defect].astype(dtype, copy=False))
            areas.append(stats[:, cv2.CC_STAT_AREA][label[defect]])
    negatives.sort()
    return negatives, np.concatenate(scores), np.concatenate(areas)


def _vertices(negatives: Sequence[Array], scores: Array, areas: Array) -> Vertices | None:
    """From the sorted parts of the negatives, and the positives [P] with the areas of their components [P]."""
    scores, areas = _falling(scores, areas)
    return curve_vertices(negatives, scores, np.reciprocal(areas, dtype=float))


def curve_vertices(negatives: Sequence[Array], scores: Array, shares: Array) -> Vertices | None:
    """The curve's vertices; None where only one class is present.

    Args:
        negatives: their scores in parts, each of which is sorted.
        scores: of the positives, falling [P]. shares: the part of its component that each positive is, float64 [P].
    """
    count = sum(map(len, negatives))
    if not (count and len(scores)):
        return None
    last = np.flatnonzero(np.concatenate((scores[1:] != scores[:-1], [True])))  # of each group of tied positives
    found = np.cumsum(shares)
    pro, thresholds = found[last] / found[-1], scores[last]  # the shares add up to the number of components
    del found, shares, scores
    fp, fp_before = np.empty_like(last), np.empty_like(last)

    def look_up(start: int) -> None:
        chunk = slice(start, start + _CHUNK)
        keys = thresholds[chunk][::-1].copy()  # rising keys make searchsorted's next search start at the last find
        fp[chunk] = count - np.sum([np.searchsorted(part, keys, "left") for part in negatives], axis=0)[::-1]
        fp_before[chunk] = count - np.sum([np.searchsorted(part, keys, "right") for part in negatives], axis=0)[::-1]

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look_up, range(0, len(last), _CHUNK)))
    last += 1
    return Vertices(last, fp, fp_before, pro, count)


def _falling(scores: Array, areas: Array) -> tuple[Array, Array]:
    """Positives by falling score and, where tied, by rising area, so that their order in the input changes nothing."""
    if scores.dtype != np.float32:
        order = np.lexsort((areas, -scores))
        return scores[order], areas[order]
    # both in one integer, which NumPy sorts several times faster than pairs
    key = _flip((scores + np.float32(0)).view(np.uint32)).astype(np.uint64)  # + 0 turns -0 into 0
    key <<= np.uint64(32)
    key |= areas.astype(np.uint32)
    key.sort()
    return _flip((key >> np.uint64(32)).astype(np.uint32)).view(np.float32), key.astype(np.uint32)


def _flip(bits: Array) -> Array:
    """From a float32's bits to an integer that falls as the float rises, and back."""
    return np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))


def checked_images(maps: Images, masks: Images) -> tuple[Images, Images]:
    """The maps and masks as arrays. Raises ValueError where `pixel_metrics` does."""
    if not (isinstance(maps, list) and maps):
        return _checked("maps", np.asarray(maps), "masks", np.asarray(masks), "[N, H, W]")
    pairs = zip(maps, masks, strict=True)
    checked = [_checked(f"map {i}", x, f"mask {i}", y, "[H, W]") for i, (x, y) in enumerate(pairs)]
    return [x for x, _ in checked], [y for _, y in checked]


def _checked(name: str, values: Array, labels_name: str, labels: Array, shape: str) -> tuple[Array, Array]:
    values, labels = np.asarray(values), np.asarray(labels)
    if values.shape != labels.shape or values.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} and {labels_name} must both be {shape}, got {values.shape} and {labels.shape}")
    if values.size == 0:
        raise ValueError(f"{name} are empty: shape {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, got {values.dtype}")
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):  # without a temporary as large as the input
        bad = ~np.isfinite(values)
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        raise ValueError(f"{bad.sum()} of {bad.size} {name} are NaN or infinite, the first at index {first}")
    return values, labels
