"""What a data set is: lists of samples, and how a sample's two files become arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from anomalib_lite.data.image_files import read_values, to_uint8
from anomalib_lite.data.masks import Saturation, read_mask


@dataclass(frozen=True)
class Sample:
    """One image. A normal image has the defect "good" and label 0; `mask` is None for it and where no mask exists.

    The mask shows defects bright on dark, or with `dark_mask` dark on bright. It may be a folder of masks, one for each
    defect: `load_mask` gives their union. `saturations` are the thresholds of such defects, for sPRO. An `artificial`
    defect is painted into the image when it is loaded.
    """

    path: Path
    category: str
    defect: str
    label: int
    mask: Path | None
    dark_mask: bool = False
    saturations: tuple[Saturation, ...] = ()
    artificial: bool = False


@dataclass
class DataSet:
    """What a reader returns: `train` holds normal images only, `notes` are facts about the data for the result."""

    root: Path
    train: list[Sample]
    test: list[Sample]
    notes: list[str] = field(default_factory=list)


def test_counts(
    samples: Sequence[Sample], categories: Sequence[str]
) -> tuple[dict[str, dict[str, int]], dict[str, bool]]:
    """Of each category the numbers of `good` and `defective` test images, and whether pixel metrics can be computed:
    this takes defective images, all of which have a mask.
    """
    counts, has_masks = {}, {}
    for category in categories:
        test = [s for s in samples if s.category == category]
        defective = [s for s in test if s.label]
        counts[category] = {"good": len(test) - len(defective), "defective": len(defective)}
        has_masks[category] = bool(defective) and all(s.mask for s in defective)
    return counts, has_masks


def load_rgb(path: Path, value_range: Sequence[float] | None = None) -> np.ndarray:
    """The image as uint8 [H, W, 3], whatever its mode; alpha is dropped.

    `value_range` (low, high) is the range of values of images with more than 8 bits per channel; see `to_uint8`.
    The EXIF tag for the orientation is obeyed. Raises UserError if the file can't be decoded.
    """
    values = read_values(path)
    values = values if values.dtype == np.uint8 else to_uint8(values, value_range)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=-1)


def load_mask(path: Path, dark: bool = False) -> np.ndarray:
    """The mask as bool [H, W], true where the image is defective; `dark`: where the mask is dark.

    A folder of masks gives their union. Raises UserError if a file can't be decoded.
    """
    return read_mask(path, dark)[0]
