"""The saturated per-region overlap (sPRO), exact as the metrics of `functional`.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization"
(IJCV 2022): a region A_i with the saturation s_i is found by sPRO_i = min(|A_i ∩ P| / s_i, 1) where P is predicted.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from anomalib_lite.metrics.functional import Metrics, area_up_to
from anomalib_lite.metrics.names import overlap_key
from anomalib_lite.metrics.vertices import Array, curve_vertices

PART = 1 << 25  # normal pixels that are sorted together


class Region(NamedTuple):
    """One annotated defect of an image, which may have several parts.

    Attributes:
        mask: [H, W], any nonzero pixel belongs to the defect.
        saturation: the number of pixels, above 0, from which on the defect counts as found; at most its area is needed.
    """

    mask: Array
    saturation: float


Images = Callable[[], Iterable[tuple[Array, Sequence[Region]]]]


def spro_metrics(images: Images, fpr_limits: Sequence[float] = (0.05,)) -> Metrics:
    """The area under the mean sPRO of all regions over the false positive rate, up to each limit, divided by the limit.

    Every distinct score is a threshold, and tied scores are one vertex. The order of images and regions changes no bit.
    With each region's area as its saturation, and one region for each 8-connected component, it is the AUPRO.

    Algorithm: as many of a region's highest scores as its saturation are worth 1 / saturation each, the others nothing.

    Args:
        images: gives each map with its regions; it is called twice, so neither is held in memory. A map [H_i, W_i] has
            any real dtype, and higher is more anomalous. The regions are [] for a normal image. They may overlap.
            Pixels in none of them are normal. A region without a pixel counts nothing.
        fpr_limits: in (0, 1]; the key of a limit is that of `names.overlap_key`, `spro_05` for 0.05.

    Returns:
        `spro_*` as fractions; None without a region or without a normal pixel.
    """
    scores, shares = [np.empty(0, np.float32)], [np.empty(0)]
    for amap, found in images():
        for region in found:
            highest, worth = _worth(_as_float(amap[region.mask != 0]), region.saturation)
            scores.append(highest)
            shares.append(worth)
    score, share = np.concatenate(scores), np.concatenate(shares)
    order = np.lexsort((share, -score))
    vertices = curve_vertices(_negatives(images()), score[order], share[order])
    return {overlap_key("spro", x): area_up_to(vertices, x) if vertices else None for x in fpr_limits}


def _as_float(scores: Array) -> Array:
    return scores.astype(np.result_type(np.float32, scores.dtype), copy=False)


def _negatives(images: Iterable[tuple[Array, Sequence[Region]]]) -> Iterator[Array]:
    """The scores of the normal pixels, rising within each part of about PART pixels."""
    part: list[Array] = []
    for amap, found in images:
        normal = np.ones(amap.shape, bool)
        for region in found:
            normal &= region.mask == 0
        part.append(_as_float(amap[normal]))
        if sum(map(len, part)) >= PART:
            yield np.sort(np.concatenate(part))
            part = []
    yield from [np.sort(np.concatenate(part))] if part else []


def _worth(scores: Array, saturation: float) -> tuple[Array, Array]:
    """A region's scores that count, and by how much of the region each is worth; the worths add up to 1."""
    enough = min(saturation, len(scores))
    count = math.ceil(enough)
    reached = np.minimum(np.arange(count + 1), enough)
    return np.sort(scores)[::-1][:count], np.diff(reached) / max(enough, 1e-300)
