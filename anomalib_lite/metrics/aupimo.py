"""AUPIMO: how much of each defect is found while good images have next to no false positives."""

import math
from collections.abc import Sequence

import numpy as np

from anomalib_lite.metrics.vertices import Array, Images, Pixels

BOUNDS = (1e-5, 1e-4)  # of the false positive rate, the paper's
FEWEST_LEVELS = 30


def aupimo(maps: Images, masks: Images, labels: Array, bounds: tuple[float, float] = BOUNDS) -> float | None:
    """Area under the per-image overlap (Bertoldo et al., BMVC 2024, arXiv 2401.01984), the mean over defective images.

    The overlap T_i(t) of a defective image is the share of its defective pixels with a score >= t. All images share the
    false positive rate F(t), the mean over good test images of each image's own rate. With bounds (L, U),
    AUPIMO_i = 1 / log(U / L) * integral of T_i over log F, from log L to log U.

    The authors' code takes 300,000 equidistant thresholds; here every distinct score is one. Our reading: tied scores
    are a straight line over F, as in AUPRO, so that a constant map gets its chance level. The result does not depend on
    the order of the images, and a strictly increasing transform of the scores changes no bit.

    Args:
        maps, masks: as in `functional.pixel_metrics`.
        labels: [N], 1 or True for defective images. One with an empty mask is left out.
        bounds: of the false positive rate, 0 < L < U <= 1.

    Returns:
        A fraction; None without a defective pixel, and where `enough_pixels` is false.

    Raises:
        ValueError: maps that are not finite, shapes that do not fit, no pixel at all, invalid bounds.
    """
    if not 0 < bounds[0] < bounds[1] <= 1:
        raise ValueError(f"bounds must be 0 < L < U <= 1, got {bounds}")
    areas = image_areas(Pixels(maps, masks), np.asarray(labels), bounds)
    return math.fsum(areas.values()) / len(areas) if areas else None


def image_areas(pixels: Pixels, labels: Array, bounds: tuple[float, float] = BOUNDS) -> dict[int, float]:
    """AUPIMO_i of each defective image i with a defective pixel; empty where `enough_pixels` is false."""
    defective = [i for i in np.flatnonzero(labels).tolist() if pixels.mask(i).any()]
    normal = np.flatnonzero(np.logical_not(labels)).tolist()
    if not defective or not enough_pixels([pixels.mask(i).size for i in normal], bounds):
        return {}
    rates = _Rates(pixels, normal, bounds[1])
    pairs = ((i, *pixels[i]) for i in defective)
    return {i: _area(amap[mask != 0], rates, bounds) for i, amap, mask in pairs}


def enough_pixels(sizes: Sequence[int], bounds: tuple[float, float] = BOUNDS) -> bool:
    """Whether good images with these numbers of pixels have more than 30 different rates between the bounds. With fewer
    points the authors' code refuses to integrate; we count the rates that the pixels admit, whatever their scores.
    """
    return (bounds[1] - bounds[0]) * sum(sizes) > FEWEST_LEVELS


class _Rates:
    """The shared false positive rate at thresholds from `least` on, which reaches the upper bound.

    Args:
        rows: positions of the good images, whose maps are read one by one.
    """

    def __init__(self, pixels: Pixels, rows: Sequence[int], upper: float):
        self.images = len(rows)
        # where n images have a rate of upper * images / n, the mean is at the bound: one image alone, or half of them
        enough = [n for n in sorted({1, (self.images + 1) // 2}) if upper * self.images < n]
        if enough:
            shares = [upper * self.images / n for n in enough]
            highest = np.sort([_highest(pixels[i][0], shares) for i in rows], axis=0)
            self.least = max(highest[-n, column] for column, n in enumerate(enough))
        else:
            self.least = min(pixels[i][0].min() for i in rows)
        scores: dict[int, list[Array]] = {}
        for i in rows:
            amap = pixels[i][0]
            scores.setdefault(amap.size, []).append(amap[amap >= self.least])
        #: by rising size, so that sums do not depend on the order of the images
        self.scores = [(size, np.sort(np.concatenate(scores[size]))) for size in sorted(scores)]

    def at(self, thresholds: Array, side: str) -> Array:
        """The rate of scores >= (side "left") or > ("right") each threshold; thresholds must be at least `least`."""
        counts = ((size, len(x) - np.searchsorted(x, thresholds, side)) for size, x in self.scores)  # type: ignore[call-overload]
        return sum(count / size for size, count in counts) / self.images


def _highest(amap: Array, shares: Sequence[float]) -> Array:
    """The scores of a map [H, W] that these shares of its pixels are not below."""
    places = [amap.size - 1 - int(share * amap.size) for share in shares]
    return np.partition(amap, places, axis=None)[places]


def _area(scores: Array, rates: _Rates, bounds: tuple[float, float]) -> float:
    """AUPIMO_i from the scores of an image's defective pixels."""
    thresholds, counts = np.unique(scores[scores >= rates.least], return_counts=True)
    thresholds = thresholds[::-1]
    after = np.concatenate(([0.0], np.cumsum(counts[::-1]) / len(scores)))  # the overlap from each threshold on
    end = np.concatenate(([0.0], rates.at(thresholds, "left")))
    start = rates.at(thresholds, "right")  # from the last threshold's `end` to `start`, only normal pixels are added
    rise, run = np.diff(after), end[1:] - start
    slope = np.divide(rise, run, out=np.zeros_like(run), where=run > 0)
    a, b, last = (np.clip(rate, *bounds) for rate in (start, end[1:], end))
    level = after * np.log(np.append(a, bounds[1]) / last)
    tied = (after[:-1] - slope * start) * np.log(b / a) + slope * (b - a)
    return float((level.sum() + tied.sum()) / math.log(bounds[1] / bounds[0]))
