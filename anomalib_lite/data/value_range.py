"""The one range of pixel values of a data set whose files hold more than 8 bits per channel.

Eight-bit files are in (0, 255). In deeper files a camera's 10 or 12 bits, signed or floating-point numbers look the
same to a decoder, so the range is given (`data.value_range`) or found over the training images. The run stores it.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anomalib_lite.data.image_files import DEPTHS, Header, read_values
from anomalib_lite.data.samples import DataSet
from anomalib_lite.errors import UserError

Range = tuple[float, float]
#: customary scales: floats, and cameras' 8, 10, 12, 14 and 16 bits
SCALES: tuple[Range, ...] = ((0, 1), (-1, 1), *((0, 2**bits - 1) for bits in (8, 10, 12, 14, 16)))
OVERSHOOT = 0.01  # interpolation leaves a scale by about so much of it
FILLED = 0.25  # share of a scale that the images must fill; otherwise their own range has a better contrast
DARK = 1 / 12  # an image without values above this share of the range may have another scale; 12 of 16 bits are 1/16
LOOKED_AT = 32
RARE = 1e-4  # share of an image's pixels, at either end, that may lie outside: defective pixels of the sensor
log = logging.getLogger(__name__)


class Pixels(NamedTuple):
    """What a run knows of its training images: their depth (a key of DEPTHS; None: not known) and value range."""

    depth: str | None = None
    value_range: Range | None = None


def pixels_of_run(
    data: DataSet, headers: Mapping[Path, Header], given: Sequence[float] | None, stored: Pixels | None
) -> tuple[Pixels, list[str]]:
    """Depth and range for these data, which a trained run has `stored` already, and notes for the result."""
    if stored is None:
        pixels, notes = find_pixels(data, headers, given)
    else:
        pixels, notes = stored, depth_notes(stored, [(path, header.depth) for path, header in headers.items()])
    deep = [sample.path for sample in data.test if headers[sample.path].depth != "8-bit"]
    return pixels, [*notes, *range_notes(pixels, deep)]


def find_pixels(
    data: DataSet, headers: Mapping[Path, Header], given: Sequence[float] | None
) -> tuple[Pixels, list[str]]:
    """The depth and the range of a data set, given or found over its training images, and notes for the result.

    Raises UserError if files of different depths would need different ranges and none is given.
    """
    train = [sample.path for sample in data.train]
    depth = headers[train[0]].depth
    if given is not None:
        limits = (float(given[0]), float(given[1]))
        is_idle = all(header.depth == "8-bit" for header in headers.values())
        note = f"data.value_range=[{limits[0]:g},{limits[1]:g}] changes nothing: all images have {DEPTHS['8-bit']}"
        return Pixels(depth, limits), [note] * is_idle
    for sample in [*data.train, *data.test]:
        if headers[sample.path].depth != depth:
            raise UserError(
                f"{sample.path}: its pixels are {DEPTHS[headers[sample.path].depth]}, those of {train[0]} "
                f"{DEPTHS[depth]}; convert the images to one kind, or give data.value_range=[low,high] for all that "
                "have more than 8 bits"
            )
    if depth == "8-bit":
        return Pixels(depth), []
    log.info("finding the range of the values in %d training images", len(train))
    low, high, broken = extremes(train)
    chosen = customary_scale(low, high)
    note = (
        f"data.value_range=[{chosen[0]:g},{chosen[1]:g}] assumed: the pixels of the {len(train)} training images are "
        f"{DEPTHS[depth]}, nearly all of them from {low:g} to {high:g}; values outside the range are clipped"
    )
    notes = [note]
    if broken:
        notes.append(
            f"{len(broken)} training images hold NaN or infinite values, which become black (first: {broken[0]})"
        )
    return Pixels(depth, chosen), notes


def depth_notes(pixels: Pixels, found: Sequence[tuple[Path | str, str]]) -> list[str]:
    """A note on images (path, depth) whose depth differs from the training images', so that scores may not compare."""
    other = [(path, depth) for path, depth in found if pixels.depth is not None and depth != pixels.depth]
    if not other:
        return []
    path, depth = other[0]
    return [
        f"{len(other)} images are of another kind than the training images (first: {path}): their pixels are "
        f"{DEPTHS[depth]}, the training images' {DEPTHS[str(pixels.depth)]}; check the scores, or convert them"
    ]


def range_notes(pixels: Pixels, files: Sequence[Path]) -> list[str]:
    """A note on images with more than 8 bits per channel mostly outside the range, or in its lowest part.

    At most LOOKED_AT of the files are read, evenly spread.
    """
    if pixels.value_range is None or not files:
        return []
    (low, high), strange = pixels.value_range, []
    margin = OVERSHOOT * (high - low)
    chosen = [files[i * len(files) // min(len(files), LOOKED_AT)] for i in range(min(len(files), LOOKED_AT))]
    for file in chosen:
        values = read_values(file).astype(np.float64)
        values = values[np.isfinite(values)] if not np.isfinite(values).all() else values
        clipped = ((values < low - margin) | (values > high + margin)).mean()
        if not values.size or clipped > 0.5 or values.max() < low + DARK * (high - low):
            strange.append((file, values.min(initial=np.inf), values.max(initial=-np.inf)))
    if not strange:
        return []
    file, least, most = strange[0]
    return [
        f"{len(strange)} of {len(chosen)} images looked at do not fit data.value_range=[{low:g},{high:g}] of the "
        f"training images (first: {file}, values from {least:g} to {most:g}); their scores mean little: give images of "
        "the same scale"
    ]


def extremes(files: Sequence[Path]) -> tuple[float, float, list[Path]]:
    """The smallest and the largest value in the files, without NaN, infinities and each image's rarest values; and the
    files that hold NaN or infinities.

    Raises UserError if there is one value only.
    """

    def ends(file: Path) -> tuple[float, float]:
        values = read_values(file)
        if not np.isfinite(values).all():
            broken.append(file)
        values = values[np.isfinite(values)].astype(np.float64)
        rare = int(np.ceil(RARE * values.size)) if values.size > 2 else 0
        if not values.size:
            return np.inf, -np.inf
        ordered = np.partition(values, [rare, values.size - 1 - rare])
        return float(ordered[rare]), float(ordered[values.size - 1 - rare])

    broken: list[Path] = []
    with ThreadPoolExecutor(4) as pool:
        found = np.array(list(pool.map(ends, files)))
    low, high = float(found[:, 0].min()), float(found[:, 1].max())
    if not low < high:
        what = f"the value {low:g} only" if low == high else "no finite number"
        raise UserError(
            f"data.value_range: the training images hold {what}; give their range, data.value_range=[low,high]"
        )
    return low, high, sorted(broken)


def customary_scale(low: float, high: float) -> Range:
    """The smallest customary scale that contains the values if they fill a good part of it; otherwise (low, high)."""
    for scale in SCALES:
        margin = OVERSHOOT * (scale[1] - scale[0])
        if scale[0] - margin <= low and high <= scale[1] + margin:
            return scale if high - low >= FILLED * (scale[1] - scale[0]) else (low, high)
    return low, high
