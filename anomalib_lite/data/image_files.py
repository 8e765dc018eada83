"""An image file's header and its numbers: formats, depths, the range of pixel values, errors as one line."""

import contextlib
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from anomalib_lite.errors import UserError

# Pillow's limits are for files of strangers on a server: here large images and long descriptions are the user's own.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**31 - 1
warnings.filterwarnings("ignore", module=r"PIL\b")  # of odd tags and palettes, which are no user's concern
#: of the files that are read as images, in any case
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
#: kinds of pixel values, with the words that messages use
DEPTHS = {
    "8-bit": "8 bits per channel",
    "integer": "integers of more than 8 bits",
    "float": "floating-point numbers",
}
ORIENTATION = 0x0112  # EXIF's tag
SAMPLE_FORMAT = 339  # TIFF's tag: 1 is unsigned
#: Pillow's name of 16 bits per colour channel in the file, of which it decodes the upper 8 only
DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX|LA);16\w?")


#: what brings an image [H, W] or [H, W, 3] upright, by the number in its EXIF tag; an image of number 1 is upright
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: lambda values: np.rot90(values),
}


class Header(NamedTuple):
    """What a file says of its image before the pixels.

    Attributes:
        size: (height, width) of the upright image.
        depth: one of DEPTHS.
        is_turned: whether the EXIF tag says that the stored image is not upright.
        pages: number of images in the file, of which the first one is read.
    """

    size: tuple[int, int]
    depth: str
    is_turned: bool = False
    pages: int = 1


def header_of(image: Image.Image) -> Header:
    """The header of an opened image, whose pixels are not decoded."""
    turn = _orientation(image)
    is_integer = image.mode.startswith("I") or _is_deep_colour(image)
    depth = "float" if image.mode == "F" else "integer" if is_integer else "8-bit"
    size = (image.width, image.height) if turn >= 5 else (image.height, image.width)
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's MPO repeats its picture smaller
    return Header(size, depth, turn > 1, pages)


def read_header(path: Path) -> Header:
    """The header of a file. Raises UserError if the file can't be read."""
    with decoding(path), Image.open(path) as image:
        return header_of(image)


def read_values(path: Path) -> np.ndarray:
    """The file's numbers, [H, W] (gray) or [H, W, 3]: uint8, or another type with more than 8 bits; alpha is dropped.

    The EXIF tag for the orientation is obeyed, as viewers and label tools do. Raises UserError if the file can't be
    decoded.
    """
    with decoding(path), Image.open(path) as image:
        turn = _orientation(image)
        values = _decoded(path, image)
        return np.ascontiguousarray(UPRIGHT[turn](values)) if turn > 1 else values


def _decoded(path: Path, image: Image.Image) -> np.ndarray:
    """The numbers as they are stored, not turned."""
    if _is_deep_colour(image):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # of unknown tags
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("damaged")
        return np.ascontiguousarray(values[..., 2::-1])  # RGB from BGR or BGRA
    if not image.mode.startswith("I") and image.mode != "F":
        return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    values = np.array(image)
    unsigned = image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 1  # type: ignore[attr-defined]
    return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values


def to_uint8(values: np.ndarray, value_range: Sequence[float] | None = None) -> np.ndarray:
    """Values of which (low, high) become (0, 255), clipped outside: uint8 of the same shape. NaN becomes 0.

    Without a range, integers are in (0, 65535), and floating-point numbers in (0, 1) if none is above 1, else (0, 255).
    """
    if value_range is None:
        largest_float = 1 if np.nanmax(values, initial=0) <= 1 else 255
        value_range = (0, 65535 if values.dtype.kind in "iu" else largest_float)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # a table is fast, and images are loaded every epoch
        return _scaled(np.arange(65536), value_range)[values]
    return _scaled(values, value_range)


def _scaled(values: np.ndarray, value_range: Sequence[float]) -> np.ndarray:
    low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0), 0, 255)).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The number in the EXIF tag, from 1 to 8; 1 where the decoder will turn the image itself."""
    if image.format == "TIFF":  # Pillow and OpenCV turn it
        return 1
    if image.format == "PNG":  # Pillow would decode the pixels to look for a tag behind them
        known = {"exif", "Raw profile type exif"} & image.info.keys() or "Orientation" in str(image.info.get("xmp"))
        if not known and not _has_late_exif(image.fp):  # type: ignore[attr-defined]
            return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged tag is no tag
        return 1
    return found if found in UPRIGHT else 1


def _has_late_exif(file: BinaryIO) -> bool:
    """Whether a PNG has an eXIf chunk, found without reading the pixels; the file's position stays."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _is_deep_colour(image: Image.Image) -> bool:
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    args = tile.args if tile and isinstance(tile.args, tuple) else (tile.args if tile else None,)
    if image.format == "PPM":
        return image.mode == "RGB" and args[-1] == 65535
    return bool(args and DEEP_COLOUR.fullmatch(str(args[0])))


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Errors of reading the file as an image become the one-line UserError about it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it was moved or deleted since the data set was listed") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change its mode or owner") from None
    except MemoryError:
        raise UserError(f"{path}: too large for the memory that is free; give smaller images, or cut it up") from None
    except Exception as error:  # decoders raise nearly anything for a damaged file: OSError, SyntaxError, struct.error
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; copy it again or remove it") from None
        text = " ".join(str(error).split())
        why = "its content is no image" if "cannot identify" in text else text or "damaged"
        if path.suffix.lower() in (".tif", ".tiff") and "cannot identify" in text:
            why = "no TIFF, or one whose kind of pixels is not read: use 8 or 16 bits, or 32-bit floats of one channel"
        raise UserError(f"{path}: can't be decoded as an image ({why}); replace or remove the file") from None
