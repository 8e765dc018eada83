"""Ground truth masks: what a mask's file marks as defective, the check of a category's masks, MVTec LOCO's thresholds.

Masks hold 0 and 255, 0 and 1, class numbers, or colours: everything above 0 is defective. A mask with soft edges, as
JPEG, blur and interpolation leave them, is cut at half of its largest value instead.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from anomalib_lite.data.image_files import read_values
from anomalib_lite.data.image_folders import listing
from anomalib_lite.errors import UserError

LOSSY = (".avif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".webp")  # formats in which two values may not stay two
HALF = 127  # of 8 bits; a lossy mask below it holds class numbers
CLASSES = 10, 64  # soft masks have more values than 10 (VisA's classes are 1..9); more than 64 values are no classes
NOISE = 1 / 16  # of the largest value
REVERSED = 0.5, 0.9  # a mask is taken for reversed if it marks more than 0.5 of its image and 0.9 of the border
NEARLY_ALL = 0.9  # share of a category's masks
SATURATION_KEYS = ("pixel_value", "saturation_threshold", "relative_saturation")  # of MVTec LOCO
PIXELS = 10**8  # masks of a category are looked at up to so many pixels, unless the check is thorough


class MaskFacts(NamedTuple):
    """Shares of the image and of its border that a mask marks, and whether its edges are soft."""

    share: float
    border: float
    is_soft: bool


def mask_facts(path: Path, dark: bool = False) -> MaskFacts:
    """Raises UserError if the mask can't be decoded."""
    mask, is_soft = read_mask(path, dark)
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return MaskFacts(float(mask.mean()), float(border.mean()), is_soft)


def mask_files(path: Path) -> list[Path]:
    """The files of a mask: itself, or the images in a folder of masks."""
    return listing(path).images if path.is_dir() else [path]


def read_mask(path: Path, dark: bool = False) -> tuple[np.ndarray, bool]:
    """The mask as bool [H, W], true where the image is defective, and whether its edges are soft.

    With `dark`, values below half of white are defective. White is the largest value of the file's type, or 1. A folder
    of masks gives their union, which is soft if one of them is.

    Raises UserError if a file can't be decoded.
    """
    masks, soft = zip(*(_read_file(file, dark) for file in mask_files(path)), strict=True)
    return np.logical_or.reduce(masks), any(soft)


def _read_file(path: Path, dark: bool) -> tuple[np.ndarray, bool]:
    values = read_values(path)
    values = values.max(axis=-1) if values.ndim == 3 else values
    if dark:
        white = 1 if values.max() <= 1 else np.iinfo(values.dtype).max if values.dtype.kind == "u" else values.max()
        values = np.where(values < white / 2, white, 0)
    is_soft = _is_soft(values, path.suffix.lower() in LOSSY)
    return values > (values.max() / 2 if is_soft else 0), is_soft


def _is_soft(values: np.ndarray, lossy: bool) -> bool:
    """Whether the values [H, W] between 0 and the largest are those of an edge, or noise of a lossy format.

    Classes fill areas: most of their pixels belong to a block of 2×2 equal ones. Edges and noise have few such blocks.
    A pixel of an edge has a brighter one beside it; noise is near 0. Thin lines of a class are neither.
    """
    largest = values.max()
    between = (values > 0) & (values < largest)
    if not between.any():
        return False
    number = len(np.unique(values[between])) + 2
    if number > CLASSES[1] or (lossy and largest > HALF):
        return True
    if number <= CLASSES[0] and largest <= HALF:
        return False
    equal = between[:-1, :-1].copy()
    for other in (values[1:, :-1], values[:-1, 1:], values[1:, 1:]):
        equal &= values[:-1, :-1] == other
    in_block = np.zeros(values.shape, bool)
    for rows in (slice(-1), slice(1, None)):
        for columns in (slice(-1), slice(1, None)):
            in_block[rows, columns] |= equal
    if number > CLASSES[0]:
        return bool(in_block[between].mean() < 0.5)
    brighter = cv2.dilate(values.astype(np.float32), np.ones((3, 3))) > values
    return bool((~in_block & (brighter | (values <= NOISE * largest)))[between].mean() >= 0.5)


def evenly_spread(sizes: Mapping[Path, tuple[int, int]]) -> list[Path]:
    """As many of the masks, evenly spread, as have PIXELS pixels together; one at least. `sizes`: (height, width)."""
    masks, total = list(sizes), sum(height * width for height, width in sizes.values())
    count = min(len(masks), max(1, int(len(masks) * PIXELS / max(total, 1))))
    return [masks[i * len(masks) // count] for i in range(count)]


def mask_notes(category: str, facts: Mapping[Path, MaskFacts], total: int, empty: bool) -> list[str]:
    """Notes on masks of a category that are soft or mark much of their image, and with `empty` on those without defect.

    Raises UserError if nearly all masks look reversed: the defect would be everything else. `total` is the number of
    the category's masks, some of which may not have been looked at.
    """
    of = f"{len(facts)} masks" if len(facts) == total else f"{len(facts)} masks looked at"
    much, border = REVERSED
    backwards = [path for path, mask in facts.items() if mask.share > much and mask.border > border]
    if backwards and len(backwards) >= NEARLY_ALL * len(facts):
        first = backwards[0]
        none = ", because none of its pixels is 0" * (facts[first].share == 1)
        raise UserError(
            f"{first}: this mask marks {facts[first].share:.0%} of its image as defective{none}, as "
            f"{len(backwards)} of {of} of '{category}' do; defects must be white on black: invert the masks "
            "(data.normal=DIR has data.mask_defect), or remove them and do without pixel metrics"
        )
    notes = []
    if empty and (blank := [path for path, mask in facts.items() if not mask.share]):
        notes.append(f"{category}: {len(blank)} of {of} are empty (first: {_name(blank[0])})")
    if large := [path for path, mask in facts.items() if mask.share > much]:
        notes.append(
            f"{category}: {len(large)} of {of} mark more than half of the image as defective "
            f"(first: {_name(large[0])}, {facts[large[0]].share:.0%})"
        )
    if soft := [path for path, mask in facts.items() if mask.is_soft]:
        notes.append(
            f"{category}: {len(soft)} of {of} have soft edges, as JPEG and blur leave them, and are cut at half of "
            f"their largest value (first: {_name(soft[0])})"
        )
    return notes


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


# --- saturation thresholds ---


class Saturation(NamedTuple):
    """The area from which on a defect counts as found, for sPRO: a missing object has no exact place, so all places
    where it could be are annotated, and some of them suffice.

    The threshold is that of the defects whose mask has the value `pixel`: pixels, or a share of the area if `relative`.
    """

    pixel: int
    threshold: float
    relative: bool

    def area(self, defect: int) -> int:
        """The pixels that suffice, of a defect of so many. The share is rounded down, as the authors' code does."""
        return max(1, int(self.threshold * defect) if self.relative else min(int(self.threshold), defect))


def read_saturations(file: Path) -> tuple[Saturation, ...]:
    """The thresholds in a `defects_config.json`. Raises UserError if the file is missing or means nothing."""
    try:
        found = [tuple(entry[key] for key in SATURATION_KEYS) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; sPRO needs its thresholds, take it from the data set") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file}: not a list of defects with {', '.join(SATURATION_KEYS)} ({why}); restore the file"
        ) from None
    for pixel, threshold, relative in found:
        numbers = all(isinstance(value, int | float) and value > 0 for value in (pixel, threshold))
        if not numbers or not isinstance(relative, bool) or (relative and threshold > 1):
            raise UserError(
                f"{file}: pixel_value={pixel}, saturation_threshold={threshold}, relative_saturation={relative} is no "
                "threshold; restore the file"
            )
    return tuple(Saturation(*entry) for entry in found)
