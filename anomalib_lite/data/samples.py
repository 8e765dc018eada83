"""What a data set is: lists of samples, and how a sample's two files become arrays."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_lite.errors import UserError

#: of the files that are read as images, in any case
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image. A normal image has the defect "good" and label 0; `mask` is None for it and where no mask exists."""

    path: Path
    category: str
    defect: str
    label: int
    mask: Path | None


@dataclass
class DataSet:
    """What a reader returns: `train` holds normal images only, `notes` are facts about the data for the result."""

    root: Path
    train: list[Sample]
    test: list[Sample]
    notes: list[str] = field(default_factory=list)


def is_image(path: Path) -> bool:
    """Whether the path is a visible file with an image's suffix; hidden are .ipynb_checkpoints, ._000.png."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def load_rgb(path: Path) -> np.ndarray:
    """The image as uint8 [H, W, 3], whatever its mode; alpha is dropped, 16-bit gray is scaled by 1/257.

    A float image with values up to 1 is taken for [0, 1], any other for [0, 255]. EXIF rotation is not applied: masks
    carry no such tag, so a turned image would no longer fit its mask. Raises UserError if the file can't be decoded.
    """
    image = _decode(path)
    if image.mode.startswith("I"):  # "I;16", "I;16B", and "I", which older Pillow gives for 16-bit PNG
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        gray = ((values + 128) // 257).astype(np.uint8)
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1 else 1.0
        gray = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(gray[..., None], 3, axis=-1)


def load_mask(path: Path) -> np.ndarray:
    """The mask as bool [H, W]: true where any colour channel is above 0 (VisA's masks hold 1..9 and look black)."""
    image = _decode(path)
    if image.mode.startswith("I") or image.mode == "F":  # converting these would clip or round small values away
        return np.asarray(image) > 0
    return np.any(np.asarray(image.convert("RGB")) > 0, axis=-1)  # drops alpha, which is above 0 nearly everywhere


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the image's header. Raises UserError if the file can't be read."""
    with decoding(path), Image.open(path) as image:
        return image.height, image.width


def _decode(path: Path) -> Image.Image:
    with decoding(path), Image.open(path) as image:
        image.load()
        return image


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
    except Exception as error:  # decoders raise nearly anything for a damaged file: OSError, SyntaxError, struct.error
        text = " ".join(str(error).split())
        why = "its content is no image" if "cannot identify" in text else text or "damaged"
        raise UserError(f"{path}: can't be decoded as an image ({why}); replace or remove the file") from None
