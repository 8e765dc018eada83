"""The saturated per-region overlap (sPRO), exact as the metrics of `functional`.

Bergmann et al., "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and Localization"
(IJCV 2022): a region A_i with the saturation s_i is found by sPRO_i = min(|A_i ∩ P| / s_i, 1) where P is predicted.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


def spro_metrics(
    maps: Sequence[Array], regions: Sequence[Sequence[Region]], fpr_limits: Sequence[float] = (0.05,)
) -> Metrics:
    """The area under the mean sPRO of all regions over the false positive rate, up to each limit, divided by the limit.

    Every distinct score is a threshold, and tied scores are one vertex. The order of images and regions changes no bit.
    With each region's area as its saturation, and one region for each 8-connected component, it is the AUPRO.

    Algorithm: as many of a region's highest scores as its saturation are worth 1 / saturation each, the others nothing.

    Args:
        maps: N maps [H_i, W_i], higher is more anomalous, any real dtype. They are read twice, image by image, and so
            are the regions: both may be sequences that hold neither in memory.
        regions: those of each image, [] for a normal one. They may overlap. Pixels in none of them are normal. A region
            without a pixel counts nothing.
        fpr_limits: in (0, 1]; the key of a limit is that of `names.overlap_key`, `spro_05` for 0.05.

    Returns:
        `spro_*` as fractions; None without a region or without a normal pixel.

    Raises:
        ValueError: maps that are not finite, shapes that do not fit, a saturation or a limit out of its range.
    """
    if not all(0 < limit <= 1 for limit in fpr_limits):
        raise ValueError(f"fpr_limits must lie in (0, 1], got {tuple(fpr_limits)}")
    dtypes = {maps.dtype} if hasattr(maps, "dtype") else {amap.dtype for amap in maps}
    dtype = np.result_type(np.float32, *dtypes)
    scores, shares = [np.empty(0, dtype)], [np.empty(0)]
    for amap, found in _images(maps, regions):
        for region in found:
            highest, worth = _worth(amap[region.mask != 0].astype(dtype, copy=False), region.saturation)
            scores.append(highest)
            shares.append(worth)
    score, share = np.concatenate(scores), np.concatenate(shares)
    order = np.lexsort((share, -score))
    vertices = curve_vertices(_negatives(maps, regions, dtype), score[order], share[order])
    return {overlap_key("spro", x): area_up_to(vertices, x) if vertices else None for x in fpr_limits}


def _images(maps: Sequence[Array], regions: Sequence[Sequence[Region]]) -> Iterator[tuple[Array, Sequence[Region]]]:
    """Each map with its regions, checked."""
    for i, (amap, found) in enumerate(zip(maps, regions, strict=True)):
        if amap.ndim != 2 or any(region.mask.shape != amap.shape for region in found):
            raise ValueError(f"map {i} and its regions must all be [H, W], got {amap.shape}")
        if not np.isfinite(amap).all():
            raise ValueError(f"map {i} has values that are NaN or infinite")
        yield amap, found


def _negatives(maps: Sequence[Array], regions: Sequence[Sequence[Region]], dtype: Any) -> Iterator[Array]:
    """The scores of the normal pixels, rising within each part of about PART pixels."""
    part: list[Array] = []
    for amap, found in _images(maps, regions):
        normal = np.ones(amap.shape, bool)
        for region in found:
            normal &= region.mask == 0
        part.append(amap[normal].astype(dtype, copy=False))
        if sum(map(len, part)) >= PART:
            yield np.sort(np.concatenate(part))
            part = []
    yield from [np.sort(np.concatenate(part))] if part else []


def _worth(scores: Array, saturation: float) -> tuple[Array, Array]:
    """A region's scores that count, and by how much of the region each is worth; the worths add up to 1."""
    if not saturation > 0:
        raise ValueError(f"a region's saturation must be above 0, got {saturation}")
    enough = min(saturation, len(scores))
    count = math.ceil(enough)
    reached = np.minimum(np.arange(count + 1), enough)
    return np.sort(scores)[::-1][:count], np.diff(reached) / max(enough, 1e-300)
