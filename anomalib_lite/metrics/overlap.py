"""IoU and Dice of the defective pixels that a threshold finds."""

import numpy as np

from anomalib_lite.metrics.functional import Images, Metrics, checked_images

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
    pairs = [(amap > np.float64(threshold), mask != 0) for amap, mask in zip(*checked_images(maps, masks), strict=True)]
    hits = sum(int(np.count_nonzero(found & mask)) for found, mask in pairs)
    found_pixels = sum(int(np.count_nonzero(found)) for found, _ in pairs)
    defective = sum(int(np.count_nonzero(mask)) for _, mask in pairs)
    if defective in (0, sum(mask.size for _, mask in pairs)):
        return dict.fromkeys(OVERLAP)
    union = found_pixels + defective - hits
    return dict(zip(OVERLAP, (hits / union, 2 * hits / (found_pixels + defective)), strict=True))
