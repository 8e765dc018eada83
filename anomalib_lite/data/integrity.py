"""Check of a data set's files before a run starts, so that a damaged file can't stop the run hours later."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomalib_lite.data.cores import threads
from anomalib_lite.data.image_files import Header, decoding, header_of, read_values
from anomalib_lite.data.masks import evenly_spread, mask_facts, mask_files, mask_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
TAIL = 64  # number of last bytes that are searched for the end mark; some cameras and tools add padding after it


class Decoded(NamedTuple):
    """The headers of a sample's image and masks, and for the thorough check a hash of the image's pixels."""

    sample: Sample
    header: Header
    masks: Sequence[tuple[Path, Header]] = ()
    pixels: bytes = b""


def check(dataset: DataSet, thorough: bool = False) -> tuple[dict[Path, Header], list[str]]:
    """Read every file's header and end, or decode all files if `thorough`.

    Returns the images' headers, and notes for the result.

    Masks are decoded in any case, unless a category has very many. Raises UserError for the first file (training before
    test, in order) that is damaged or whose mask has another size, and for masks that look reversed. Only the thorough
    check reports empty masks, images that are in both train and test, and different image sizes.
    """
    read = _read_pixels if thorough else _read_ends
    with ThreadPoolExecutor(min(16, 4 * threads())) as pool:
        train = list(pool.map(read, dataset.train))
        test = list(pool.map(read, dataset.test))
        headers = {decoded.sample.path: decoded.header for decoded in [*train, *test]}
        notes = _header_notes([*train, *test])
        for category in dict.fromkeys(sample.category for sample in dataset.test):
            of_mask = {s.mask: s for s in dataset.test if s.category == category and s.mask}
            sizes = {mask: headers[sample.path].size for mask, sample in of_mask.items()}
            chosen = list(sizes) if thorough else evenly_spread(sizes)
            dark = [of_mask[mask].dark_mask for mask in chosen]
            facts = dict(zip(chosen, pool.map(mask_facts, chosen, dark), strict=True))
            notes += mask_notes(category, facts, len(sizes), thorough)
    if thorough:
        notes += [*_size_notes([*train, *test]), *_duplicate_notes(train, test)]
    return headers, notes


def _read_ends(sample: Sample) -> Decoded:
    header = _check_end(sample.path)
    masks = [(file, _check_end(file)) for file in (mask_files(sample.mask) if sample.mask else ())]
    for file, mask in masks:
        if mask.size != header.size:
            turned = ", turned by its EXIF tag" * header.is_turned
            image = f"{sample.path.name} {_shown(header.size)}{turned}"
            raise UserError(
                f"{file}: the mask is {_shown(mask.size)}, its image {image}; give the mask the image's size"
            )
    return Decoded(sample, header, masks)


def _read_pixels(sample: Sample) -> Decoded:
    decoded = _read_ends(sample)
    values = read_values(sample.path)
    if values.ndim == 2:  # a gray picture may be stored as gray or as RGB
        values = np.repeat(values[..., None], 3, -1)
    digest = hashlib.sha256(_shown(decoded.header.size).encode() + values.tobytes()).digest()
    return decoded._replace(pixels=digest)


def _check_end(path: Path) -> Header:
    """The header. The whole file is decoded only if the end mark of its format is missing."""
    with decoding(path), path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - TAIL))
        tail = file.read()
        file.seek(0)
        image = Image.open(file)
        header = header_of(image)
        complete = {"PNG": tail.endswith(PNG_END), "JPEG": JPEG_END in tail}
        if not complete.get(image.format or ""):
            image.load()
        return header


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _header_notes(decoded: Sequence[Decoded]) -> list[str]:
    turned = [d.sample.path for d in decoded if d.header.is_turned]
    files = [each for d in decoded for each in ((d.sample.path, d.header), *d.masks)]
    stacks = [path for path, header in files if header.pages > 1]
    notes = {"images are turned upright, as their EXIF tag says": turned}
    notes["files hold more than one image, of which the first is used"] = stacks
    return [f"{len(paths)} {note} (first: {paths[0]})" for note, paths in notes.items() if paths]


def _size_notes(decoded: Sequence[Decoded]) -> list[str]:
    notes = []
    for category in dict.fromkeys(d.sample.category for d in decoded):
        images = [d for d in decoded if d.sample.category == category]
        sizes = Counter(_shown(d.header.size) for d in images).most_common()
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
