"""What a data set is: lists of samples, and how a sample's two files become arrays."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_lite.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One image. `defect` is "good" and `label` 0 where it is normal; `mask` is None where there is none to read."""

    path: Path
    category: str
    defect: str
    label: int
    mask: Path | None


@dataclass
class DataSet:
    """What a reader returns: `train` holds normal images only, `notes` what a result should tell about the data."""

    root: Path
    train: list[Sample]
    test: list[Sample]
    notes: list[str] = field(default_factory=list)


def load_rgb(path: Path) -> np.ndarray:
    """The image as uint8 [H, W, 3], whatever its mode; alpha is dropped, 16-bit gray is scaled by 1/257.

    A float image with values up to 1 is taken for [0, 1], any other for [0, 255]. EXIF rotation is not applied: masks
    carry no such tag, so a turned image would no longer fit its mask. Raises UserError if the file can't be decoded.
    """
    image = _decode(path)
    if image.mode.startswith("I"):  # "I;16", "I;16B", and "I", which older Pillow gives for 16-bit PNG
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return _gray_to_rgb(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1 else 1.0
        return _gray_to_rgb(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the image's header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # see _decode
        raise undecodable(path, error) from None


def load_mask(path: Path) -> np.ndarray:
    """The mask as bool [H, W]: true where any colour channel is above 0 (VisA's masks hold 1..9 and look black)."""
    image = _decode(path)
    if image.mode.startswith("I") or image.mode == "F":  # converting these would clip or round small values away
        return np.asarray(image) > 0
    return np.any(np.asarray(image.convert("RGB")) > 0, axis=-1)  # drops alpha, which is above 0 nearly everywhere


def _gray_to_rgb(gray_HW: np.ndarray) -> np.ndarray:  # noqa: N803
    return np.repeat(gray_HW[..., None], 3, axis=-1)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # a broken file makes decoders raise nearly anything: OSError, SyntaxError, struct.error
        raise undecodable(path, error) from None


def undecodable(path: Path, error: Exception) -> UserError:
    """The one line for a file that can't be read as an image."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; it was moved or deleted since the data set was listed")
    if isinstance(error, PermissionError):
        return UserError(f"{path}: no permission to read it; change its mode or owner")
    why = "its content is no image" if "cannot identify" in str(error) else " ".join(str(error).split()) or "damaged"
    return UserError(f"{path}: can't be decoded as an image ({why}); replace or remove the file")
