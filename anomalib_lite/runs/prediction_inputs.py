"""What `input=` of predict names. Imports nothing heavy."""

import csv
import fnmatch
import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anomalib_lite.errors import UserError
from anomalib_lite.paths import absolute


class Inputs(NamedTuple):
    """What `input=` names.

    Attributes:
        images: the files to be scored, each once.
        folders: the folders that were searched, also by a pattern with **; see `searched_below`.
        base: the folder that all inputs share: results are named by the paths below it.
        left_out: messages about what may be an image but can't be read.
        others: files that are no images.
    """

    images: list[Path]
    folders: list[Path]
    base: Path
    left_out: list[str]
    others: list[Path]

    @property
    def total(self) -> int:
        """The number of images, with those that can't be read."""
        return len(self.images) + len(self.left_out)


def inputs_of(text: str) -> Inputs:
    """An image, a folder, a pattern, or a list of these. Raises UserError for a path that does not exist."""
    from anomalib_lite.data.image_files import IMAGE_SUFFIXES
    from anomalib_lite.data.image_folders import classified, walk

    images, folders, left_out, others = list[Path](), list[Path](), list[str](), list[Path]()
    searched: list[Path] = []
    for each in listed(text):
        path = Path(each).expanduser()
        exists = os.path.lexists(path)
        if exists and not path.is_dir():  # a file that is named is tried, whatever its suffix
            images.append(path)
            continue
        matches = classified([path] if exists else sorted(map(Path, glob.glob(str(path), recursive=True))))  # noqa: PTH207
        if not exists and not any(matches):
            raise UserError(f"input={each}: no such file or folder")
        folders += matches.folders
        searched += [] if exists else searched_below(path)
        for part in (matches, *map(walk, matches.folders)):
            images += part.images
            left_out += [f"{name}: {message}" for name, message in part.unread.items()]
            others += part.others
    if not images:
        why = f"; {left_out[0]}" if left_out else ""
        raise UserError(f"input={text}: holds no image ({', '.join(IMAGE_SUFFIXES)}){why}")
    place = {each: absolute(each.absolute()) for each in [*images, *folders]}  # a file's own name may begin with ~
    base = os.path.commonpath([place[each] if each in folders else place[each].parent for each in place])
    unique = {place[each]: each for each in reversed(images)}
    return Inputs(sorted(unique), [*folders, *searched], Path(base), left_out, others)


def searched_below(pattern: Path) -> list[Path]:
    """The folders below which a pattern with ** finds files at any depth; none where it can't find the pictures of an
    output, which are PNG files.
    """
    if "**" not in pattern.parts or (pattern.suffix and not fnmatch.fnmatch(".png", pattern.suffix.lower())):
        return []
    above = Path(*pattern.parts[: pattern.parts.index("**")])
    return sorted(map(Path, glob.glob(str(above))))  # noqa: PTH207


def watched_folders(text: str) -> Inputs:
    """A folder or a list of folders, which may be empty. Raises UserError for anything else."""
    folders = [Path(each).expanduser() for each in listed(text)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"input={folder}: no such folder; watch=true takes folders, which may be empty")
    folders = sorted(set(map(absolute, folders)))
    return Inputs([], folders, Path(os.path.commonpath(folders)), [], [])


def refuse_inside(output: Path, folders: Iterable[Path], watch: bool) -> None:
    """Raise UserError where the output folder lies below a folder that is searched, or one that is watched below it."""
    for folder in folders:
        if output.absolute().is_relative_to(folder.absolute()) or output.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"output={output} lies inside input={folder}: choose a folder outside, or its pictures are read next "
                "time"
            )
        if watch and folder.resolve().is_relative_to(output.resolve()):
            raise UserError(f"input={folder} lies inside output={output}: choose another output=DIR")


def listed(text: str) -> list[str]:
    """The elements of [a,b] or ["a, b",c]; the text itself if it is no list, or if a file of this name exists."""
    if os.path.lexists(text) or not (text.startswith("[") and text.endswith("]")):
        return [text]
    elements = next(csv.reader([text[1:-1]], skipinitialspace=True), [])
    if not all(each.strip() for each in elements) or not elements:
        raise UserError(f"input={text}: give paths, as in input=[first,second]")
    return [each.strip() for each in elements]
