"""Check of a data set's files before a run starts, so that a damaged file can't stop the run hours later."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from anomalib_lite.data.cores import threads
from anomalib_lite.data.samples import DataSet, Sample, decoding, load_mask, load_rgb
from anomalib_lite.errors import UserError

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
TAIL = 64  # number of last bytes that are searched for the end mark; some cameras and tools add padding after it


class Decoded(NamedTuple):
    """Facts about a sample's image for the thorough check: its size as "WxH", and a hash of its pixels."""

    sample: Sample
    size: str
    mask_is_empty: bool
    pixels: bytes


def check(dataset: DataSet, thorough: bool = False) -> list[str]:
    """Read every file's header and end, or decode all files if `thorough`, and return notes for the result.

    Raises UserError for the first file (training before test, in order) that is damaged or whose mask has another size.
    Only the thorough check reports empty masks, images that are in both train and test, and different image sizes.
    """
    read = _read_pixels if thorough else _read_ends
    with ThreadPoolExecutor(min(16, 4 * threads())) as pool:
        train = list(pool.map(read, dataset.train))
        test = list(pool.map(read, dataset.test))
    return [*_mask_and_size_notes([*train, *test]), *_duplicate_notes(train, test)] if thorough else []


def _read_ends(sample: Sample) -> Decoded:
    size = _check_end(sample.path)
    if sample.mask is not None:
        _check_mask_size(sample, size, _check_end(sample.mask))
    return Decoded(sample, size, False, b"")


def _read_pixels(sample: Sample) -> Decoded:
    decoded = _read_ends(sample)
    image = load_rgb(sample.path)
    empty = sample.mask is not None and not load_mask(sample.mask).any()
    digest = hashlib.sha256(decoded.size.encode() + image.tobytes()).digest()
    return Decoded(sample, decoded.size, empty, digest)


def _check_end(path: Path) -> str:
    """The size "WxH" from the header. The whole file is decoded only if the end mark of its format is missing."""
    with decoding(path), path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        if length == 0:
            raise UserError(f"{path}: the file is empty; copy it again or remove it")
        file.seek(max(0, length - TAIL))
        tail = file.read()
        file.seek(0)
        image = Image.open(file)
        complete = {"PNG": tail.endswith(PNG_END), "JPEG": JPEG_END in tail}
        if not complete.get(image.format or ""):
            image.load()
        return f"{image.width}x{image.height}"


def _check_mask_size(sample: Sample, size: str, mask_size: str) -> None:
    if size != mask_size:
        raise UserError(
            f"{sample.mask}: the mask is {mask_size}, its image {sample.path.name} {size}; "
            "give the mask the image's size"
        )


def _mask_and_size_notes(decoded: Sequence[Decoded]) -> list[str]:
    notes = []
    for category in dict.fromkeys(d.sample.category for d in decoded):
        images = [d for d in decoded if d.sample.category == category]
        if empty := [d.sample for d in images if d.mask_is_empty]:
            defective = sum(d.sample.label for d in images)
            notes.append(f"{category}: {len(empty)} of {defective} masks are empty (first: {_name(empty[0])})")
        sizes = Counter(d.size for d in images).most_common()
        if len(sizes) > 1:
            listed = ", ".join(f"{size} ({number})" for size, number in sizes[:4])
            notes.append(f"{category}: images of {len(sizes)} sizes: {listed}{', ...' * (len(sizes) > 4)}")
    return notes


def _duplicate_notes(train: Sequence[Decoded], test: Sequence[Decoded]) -> list[str]:
    trained = {d.pixels: d.sample for d in train}
    seen = [d for d in test if d.pixels in trained]
    if not seen:
        return []
    first = f"{_name(seen[0].sample)} equals train {trained[seen[0].pixels].path.name}"
    return [f"{len(seen)} test images are identical to training images (first: {first})"]


def _name(sample: Sample) -> str:
    return f"{sample.category} {sample.defect}/{sample.path.name}"
