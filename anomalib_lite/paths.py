"""Where things lie that runs share, and how a file is written whole or not at all. Imports nothing heavy."""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib_lite.errors import UserError

PACKAGE = Path(__file__).resolve().parent
#: The folder that holds conf/ and experiments/: the package in a wheel, the checkout in an editable install.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def cache_folder() -> Path:
    """The folder of everything that runs share: ANOMALIB_LITE_CACHE, or ~/.cache/anomalib_lite.

    Where a user has no home folder or may not write there (`docker --user`), it lies below the temporary files.
    """
    if given := os.environ.get("ANOMALIB_LITE_CACHE"):
        return Path(given).expanduser()
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in passwd
        folder = Path.home() / ".cache" / "anomalib_lite"
        nearest = next(each for each in (folder, *folder.parents) if each.exists())
        if os.access(nearest, os.W_OK):
            return folder
    return Path(tempfile.gettempdir()) / f"anomalib_lite-{os.getuid()}"


def absolute(path: str | Path) -> Path:
    """The absolute path without ".."; what follows the last ".." keeps its names, also those of links."""
    path = Path(path).expanduser().absolute()
    if ".." not in path.parts:
        return path
    end = len(path.parts) - path.parts[::-1].index("..")
    return Path(*path.parts[:end]).resolve().joinpath(*path.parts[end:])


def relative_path(path: Path, root: str | Path | None) -> str:
    """The path below `root` with slashes, as tables name an image; the path itself if it lies elsewhere.

    It is readable; see `readable`.
    """
    below = path.relative_to(root) if root is not None and path.is_relative_to(root) else path
    return readable(below.as_posix())


def readable(name: str) -> str:
    r"""A file's name as text that UTF-8 can hold: bytes that are not UTF-8, as of another system, become \xe4."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def readable_texts(value: Any) -> Any:
    """A value of JSON with all its texts `readable`."""
    if isinstance(value, dict):
        return {readable_texts(key): readable_texts(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [readable_texts(each) for each in value]
    return readable(value) if isinstance(value, str) else value


def file_name(text: str) -> str:
    """The name of the file that `readable` has given as this text."""
    found = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(text))
    return os.fsdecode(found)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; it replaces `file` when the block ends without an exception.

    So a reader, or a run after a crash, finds the old file or the new one, never a part. The path keeps the suffix.
    """
    part = file.with_name(f"{file.stem}.part{file.suffix}")
    try:
        yield part
        part.replace(file)
    finally:  # also of a program that was interrupted
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` when the block ends without an exception.

    Raises OSError where `folder` holds files by then, as when another process was faster; an empty one is replaced.
    """
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def make_folder(folder: Path, option: str) -> None:
    """Make the folder that the option names; UserError where that is not possible, or where no file can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another {option}=DIR") from error
