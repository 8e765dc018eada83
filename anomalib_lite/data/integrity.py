"""A look at the files of a data set before a run starts: better now than in the middle of the night."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from anomalib_lite.data.samples import DataSet, Sample, load_mask, load_rgb, undecodable
from anomalib_lite.errors import UserError

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
TAIL = 64  # bytes at the end in which a complete file has its end mark; some cameras and tools pad after it


def check(dataset: DataSet, thorough: bool = False) -> list[str]:
    """Read every file's header and end, or decode everything if `thorough`, and return notes.

    Raises UserError for the first file (training before test, in order) that is damaged or whose mask has another size.
    Only the thorough check looks for empty masks, images that are in both train and test, and differing sizes.
    """
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        samples = dataset.train + dataset.test
        facts = [pool.submit(_thorough if thorough else _fast, sample) for sample in samples]
        try:
            found = [fact.result() for fact in facts]
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return _notes(dataset, found) if thorough else []


def _fast(sample: Sample) -> tuple[tuple[int, int], bool, bytes]:
    size = _readable(sample.path)
    if sample.mask is not None:
        _same_size(sample, size, _readable(sample.mask))
    return size, False, b""


def _thorough(sample: Sample) -> tuple[tuple[int, int], bool, bytes]:
    """Size (W, H), whether the mask is empty, and a hash of the pixels."""
    _readable(sample.path)
    image = load_rgb(sample.path)
    size = image.shape[1], image.shape[0]
    empty = False
    if sample.mask is not None:
        _readable(sample.mask)
        mask = load_mask(sample.mask)
        _same_size(sample, size, (mask.shape[1], mask.shape[0]))
        empty = not mask.any()
    return size, empty, hashlib.sha256(repr(size).encode() + image.tobytes()).digest()


def _readable(path: Path) -> tuple[int, int]:
    """(W, H) from the header. Decodes the whole file only where its end does not look like the end of its format."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            length = file.tell()
            if length == 0:
                raise UserError(f"{path}: the file is empty; copy it again or remove it")
            file.seek(max(0, length - TAIL))
            tail = file.read()
            file.seek(0)
            image = Image.open(file)
            complete = (image.format == "PNG" and tail.endswith(PNG_END)) or (
                image.format == "JPEG" and JPEG_END in tail
            )
            if not complete:
                image.load()
            return image.size
    except UserError:
        raise
    except Exception as error:  # see samples._decode
        raise undecodable(path, error) from None


def _same_size(sample: Sample, size: tuple[int, int], mask: tuple[int, int]) -> None:
    if size != mask:
        raise UserError(
            f"{sample.mask}: the mask is {mask[0]}x{mask[1]}, its image {sample.path.name} {size[0]}x{size[1]}; "
            "give the mask the image's size"
        )


def _notes(dataset: DataSet, found: list[tuple[tuple[int, int], bool, bytes]]) -> list[str]:
    samples = dataset.train + dataset.test
    trained = {digest: s for s, (_, _, digest) in zip(dataset.train, found, strict=False)}
    notes = []
    for category in dict.fromkeys(s.category for s in samples):
        mine = [(s, *facts) for s, facts in zip(samples, found, strict=True) if s.category == category]
        empty = [s for s, _, no_pixel, _ in mine if no_pixel]
        if empty:
            defective = sum(s.label for s, *_ in mine)
            notes.append(f"{category}: {len(empty)} of {defective} masks are empty (first: {_short(empty[0])})")
        sizes = Counter(size for _, size, _, _ in mine)
        if len(sizes) > 1:
            listed = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4))
            notes.append(f"{category}: images of {len(sizes)} sizes: {listed}{', ...' * (len(sizes) > 4)}")
    seen = [
        (s, trained[digest])
        for s, (_, _, digest) in zip(dataset.test, found[len(dataset.train) :], strict=True)
        if digest in trained
    ]
    if seen:
        test, train = seen[0]
        notes.append(
            f"{len(seen)} test images are identical to training images "
            f"(first: {_short(test)} equals train {train.path.name})"
        )
    return notes


def _short(sample: Sample) -> str:
    return f"{sample.category} {sample.defect}/{sample.path.name}"
