"""Whether an exported file gives the scores that the run gives: on normal training images, and how test images fare."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError
from anomalib_lite.exporting.files import Scorer, scores_of
from anomalib_lite.metrics.functional import image_metrics
from anomalib_lite.runs.artifacts import read_normal, read_scores

NORMAL_IMAGES = 64  # of the training images that calibrate and check a file
SAME = 1e-3  # relative difference of scores that no float32 file exceeds; more is a fault
#: The score of a normal image may move by this share of the way from the median of the normal images' scores to the
#: threshold. So a usual normal image stays good, and the order of images changes only among nearly equal scores.
TOLERANCE = 0.2


def noise(size: Sequence[int]) -> list[np.ndarray]:
    """Two images of noise, larger and smaller than `size`: for a run whose data are no longer there."""
    rng, (height, width) = np.random.default_rng(0), size
    sizes = (height + height // 4, width + width // 2), (height, max(1, width - width // 4))
    return [rng.integers(0, 256, (*each, 3), np.uint8) for each in sizes]


def spread(samples: Sequence[Sample], count: int = NORMAL_IMAGES) -> list[Sample]:
    """At most so many of the samples, evenly over the list."""
    return [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int))]


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found − expected| / |expected|."""
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1e-12)).max())


def room(run: Path, thresholds: dict[str, dict[str, float]]) -> float:
    """How far scores may move: TOLERANCE of the way from the median normal score to the threshold, of all categories
    the least. Both come from the run's normal images.
    """
    normal = read_normal(run)
    ways = [
        limits["image"] - np.median(normal["scores"][normal["categories"] == name])
        for name, limits in thresholds.items()
    ]
    return TOLERANCE * float(min(ways))


def check_moved(found: np.ndarray, expected: np.ndarray, allowed: float, precision: str, force: bool) -> str:
    """The line on how far normal images' scores have moved. Raises UserError if it is too far, unless `force`."""
    moved = float(np.abs(found - expected).max())
    line = (
        f"the scores of {len(found)} normal training images move by at most {moved:.3g}, which is "
        f"{100 * largest_difference(found, expected):.3g} % ({allowed:.3g} is allowed)"
    )
    if not moved <= allowed and not force:  # NaN is refused too
        raise UserError(f"precision={precision}: {line}; give precision=float32, or force=true to write the file")
    return line


def auroc_line(
    run: Path, data: AnomalyDataModule, categories: Sequence[str], scorer: Scorer, load: Callable[[Path], Any]
) -> str:
    """Image AUROC of the run's test images, mean over categories, by its own scores and by the file's."""
    before, after, count, stored = [], [], 0, read_scores(run)
    for name in categories:
        samples = [sample for sample in data.test_samples if sample.category == name]
        labels = np.array([sample.label for sample in samples])
        if len(set(labels.tolist())) < 2:
            continue
        scores = scores_of(scorer, (load(sample.path) for sample in samples))
        count += len(samples)
        before.append(image_metrics(stored[name].scores, stored[name].labels)["image_auroc"])
        after.append(image_metrics(scores, labels)["image_auroc"])
    if not count:
        return "image AUROC: no good and defective test images to measure it on"
    means = [float(np.mean(values)) for values in (before, after)]  # type: ignore[arg-type]
    return f"image AUROC on {count} test images: {means[0]:.4f} before, {means[1]:.4f} after"
