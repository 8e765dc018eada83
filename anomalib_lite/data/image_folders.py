"""What a folder holds: images that are read, images that can't be, and other files. Nothing is passed over in silence.

Hidden files and folders, and those that systems leave behind (CLUTTER), are nobody's: they are not listed.
"""

import mimetypes
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from anomalib_lite.data.image_files import IMAGE_SUFFIXES
from anomalib_lite.errors import UserError

CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}
#: formats of cameras and science that are not read, beside those that the standard library or Pillow knows
OTHER_FORMATS = {
    ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".fits", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".mat", ".nef",
    ".nii", ".npy", ".npz", ".nrrd", ".orf", ".pfm", ".psd", ".raf", ".raw", ".rw2", ".svg",
}  # fmt: skip
#: what people call normal images, other than "good"; words of BESIDE and digits, as in "ok_images", change nothing
NORMAL = {
    "good", "goods", "ok", "okay", "oks", "io", "normal", "normals", "nominal", "healthy", "intact", "clean",
    "flawless", "fine", "pass", "passed", "negative", "negatives", "nodefect", "nodefects", "defectfree", "defectless",
    "nondefective", "undamaged", "noanomaly", "nonanomalous", "regular", "gut", "correct", "accept", "accepted",
    "none", "perfect", "clear", "faultless", "withoutdefect", "withoutdefects", "gutteile", "bon", "bons", "conforme",
    "bueno", "buenos", "正常", "良品", "合格", "正品",
}  # fmt: skip
BESIDE = {
    "all", "class", "data", "image", "images", "img", "imgs", "part", "parts", "photo", "photos", "picture", "pictures",
    "sample", "samples", "test", "train",
}  # fmt: skip


class Listing(NamedTuple):
    """A folder's entries, sorted.

    Attributes:
        images: files that are read as images.
        unread: what may be an image but can't be read, with the rest of the message about it.
        others: files that are no images.
        folders: folders, also linked ones.
    """

    images: list[Path]
    unread: dict[Path, str]
    others: list[Path]
    folders: list[Path]


def listing(folder: Path) -> Listing:
    """The entries of a folder; all lists are empty if it does not exist. Raises UserError if it can't be read."""
    try:
        return classified(sorted(folder.iterdir()) if folder.is_dir() else [])
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; change its mode or owner") from None


def classified(entries: Iterable[Path]) -> Listing:
    """What these files and folders are."""
    found = Listing([], {}, [], [])
    for path in entries:
        if path.name.startswith(".") or path.name.lower() in CLUTTER:
            continue
        if path.is_dir():
            found.folders.append(path)
        elif not path.exists():
            found.unread[path] = "a link to a file that is missing; restore the file, or remove the link"
        elif not path.is_file():
            found.unread[path] = "no regular file; remove it"
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.images.append(path)
        elif (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
            found.unread[path] = "a video is not read; save its frames as images, or move it to another folder"
        elif _is_other_image(path):
            found.unread[path] = f"this kind of image is not read; convert it to one of {' '.join(IMAGE_SUFFIXES)}"
        else:
            found.others.append(path)
    return found


def walk(folder: Path, above: Sequence[str] = ()) -> Listing:
    """The entries of a folder and of all folders below it, linked ones too; `folders` is empty."""
    found = listing(folder)
    real = os.path.realpath(folder)
    for below in found.folders:
        if os.path.realpath(below) in (*above, real):
            found.unread[below] = "a link to a folder above it; remove it"
            continue
        part = walk(below, (*above, real))
        found.images.extend(part.images)
        found.unread.update(part.unread)
        found.others.extend(part.others)
    return Listing(sorted(found.images), found.unread, found.others, [])


def check_readable(found: Listing) -> None:
    """Raise UserError for the first file that may be an image but can't be read."""
    for path, message in found.unread.items():
        raise UserError(f"{path}: {message}")


def holds_images(folder: Path) -> bool:
    """Whether there is an image, of any kind, in the folder or below it; looked for up to the first one."""
    for place, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_FORMATS):
                return True
        if any((Path(place) / name).is_symlink() and holds_images(Path(place) / name) for name in below):
            return True
    return False


def means_normal(name: str) -> bool:
    """Whether a person would take a folder of this name for normal images: ok, Good, no_defect, normal_images."""
    words = [word for word in re.split(r"[\W_\d]+", name.lower()) if word and word not in BESIDE]
    return "".join(words) in NORMAL


def _is_other_image(path: Path) -> bool:
    """By its name or its content."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind.startswith("image/") or path.suffix.lower() in OTHER_FORMATS:
        return True
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow raises nearly anything for a file that it does not know
        return False
