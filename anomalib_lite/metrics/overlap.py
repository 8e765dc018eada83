"""IoU and Dice of the defective pixels that a threshold finds."""

import numpy as np

from anomalib_lite.metrics.functional import Metrics
from anomalib_lite.metrics.vertices import Array, Images, Pixels

OVERLAP = ("pixel_iou", "pixel_dice")


def overlap_metrics(maps: Images, masks: Images, threshold: float) -> Metrics:
    """IoU, and Dice (which is F1 at the threshold), pooled over the pixels of all images.

    A pixel counts as defective if its score exceeds the threshold, as in a run's decisions and heat maps. Pooled means
    that pixels are counted over all images before the division, as in the segmentation F1 of MVTec AD 2. Its authors'
    threshold is the mean of the scores of normal pixels plus three standard deviations; a run gives its own.

    Args:
        maps, masks: as in `functional.pixel_metrics`.
        threshold: a score, which must not be chosen by the test images.

    Returns:
        `pixel_iou` and `pixel_dice` as fractions; both None where only one class is present.

    Raises:
        ValueError: maps that are not finite, shapes that do not fit, no pixel at all.
    """
    return overlap_of(overlap_counts(Pixels(maps, masks), threshold).sum(0))


def overlap_counts(pixels: Pixels, threshold: float) -> Array:
    """Of each image the pixels that are found and defective, found, defective, and all, int64 [N, 4]."""
    counts = np.empty((len(pixels), 4), np.int64)
    for row, (amap, mask) in zip(counts, pixels.each(), strict=True):
        found, defect = amap > np.float64(threshold), mask != 0
        row[:] = [int(np.count_nonzero(x)) for x in (found & defect, found, defect)] + [mask.size]
    return counts


def overlap_of(counts: Array) -> Metrics:
    """IoU and Dice from the summed counts of `overlap_counts`, [4]."""
    hits, found, defective, size = map(int, counts)
    if defective in (0, size):
        return dict.fromkeys(OVERLAP)
    return dict(zip(OVERLAP, (hits / (found + defective - hits), 2 * hits / (found + defective)), strict=True))
