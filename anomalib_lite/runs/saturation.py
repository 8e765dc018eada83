"""sPRO for data whose masks have saturation thresholds (MVTec LOCO): each kind of defect apart, and their mean."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.image_files import read_values
from anomalib_lite.data.masks import mask_files
from anomalib_lite.data.samples import Sample
from anomalib_lite.data.transforms import resize_mask
from anomalib_lite.metrics.names import overlap_key
from anomalib_lite.metrics.spro import Region, spro_metrics


def add_spro(
    per_category: dict[str, Any],
    per_defect: dict[str, Any],
    data: AnomalyDataModule,
    test: dict[str, Any],
    limits: Sequence[float],
) -> list[str]:
    """Add `spro_*` to the metrics of kinds of defect and of categories, and give notes.

    A kind's images are measured against the category's good ones. A category has the mean over its kinds, as in the
    authors' evaluation. Nothing is added if no mask has a threshold.

    Args:
        per_category, per_defect: as `metrics.per_category` gives them. test: the columns of the test images.
    """
    if not any(sample.saturations for sample in data.test_samples):
        return []
    notes: dict[str, str] = {}

    def images(rows: list[int]) -> Iterator[tuple[Any, list[Region]]]:
        """Each map with its regions. Read one by one: the masks of all take gigabytes."""
        for i in rows:
            yield test["maps"][i], _regions(data, i, test["maps"], notes)

    for category, metrics in per_category.items():
        kinds = per_defect[category]
        rows = np.flatnonzero(test["categories"] == category)
        rows = rows if data.has_masks[category] else rows[:0]
        for defect, of_kind in kinds.items():
            chosen = [i for i in rows.tolist() if not test["labels"][i] or test["defects"][i] == defect]
            of_kind |= spro_metrics(partial(images, chosen), limits)
        for limit in limits:
            key = overlap_key("spro", limit)
            values = [of_kind[key] for of_kind in kinds.values() if of_kind[key] is not None]
            metrics[key] = float(np.mean(values)) if values else None
    return list(notes.values())


def _regions(data: AnomalyDataModule, index: int, maps: Sequence[Any], notes: dict[str, str]) -> list[Region]:
    """The defects of a test image at the size of its map.

    A resized defect keeps the share of its area that suffices: saturation / area. The first defect of a category that
    has no pixel left becomes a note, and so does the first without a threshold, of which the whole area is needed.
    """
    sample: Sample = data.test_samples[index]
    thresholds = {each.pixel: each for each in sample.saturations}
    regions = []
    for file in mask_files(sample.mask) if sample.mask else ():
        values = read_values(file)
        values = values.max(axis=-1) if values.ndim == 3 else values
        mask, pixel = values > 0, int(values.max())
        area = int(np.count_nonzero(mask))
        if pixel not in thresholds:
            text = f"{sample.category}: masks of value {pixel} have no saturation threshold (first: {file})"
            notes.setdefault(f"{sample.category} {pixel}", text)
        if not data.eval_pipeline.only_resizes:
            blank = np.zeros((*mask.shape, 3), np.uint8)
            mask = data.eval_pipeline.transform(blank, mask, (data.seed,))[1]
        resized = resize_mask(mask, maps[index].shape)
        left = np.count_nonzero(resized)
        if left:
            enough = thresholds[pixel].area(area) if pixel in thresholds else area
            regions.append(Region(resized, enough * left / area))
        else:
            text = f"{sample.category}: defects without a pixel at the maps' size are left out of sPRO (first: {file})"
            notes.setdefault(sample.category, text)
    return regions
