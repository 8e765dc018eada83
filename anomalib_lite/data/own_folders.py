"""Own images in any folders: normal ones here, defective ones there, masks elsewhere. No file has to be moved."""

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from anomalib_lite.data.image_files import IMAGE_SUFFIXES
from anomalib_lite.data.image_folders import check_readable, classified, means_normal, walk
from anomalib_lite.data.mvtec_layout import one_to_one
from anomalib_lite.data.reader_notes import missing_notes, passed_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import absolute, readable

Places = str | Sequence[str] | None  # a folder, a file, a pattern such as 'parts/*/ok', or a list of them
MASK_SUFFIXES = ("_mask", "_gt", "")  # part_mask.png, part_gt.png or part.png is the mask of part.jpg


def read_own_folders(
    category: str | Sequence[str],
    normal: Places,
    normal_test: Places = None,
    abnormal: Places = None,
    masks: Places = None,
    mask_defect: str = "bright",
    test_fraction: float = 0.2,
    test_seed: int = 0,
) -> DataSet:
    """One category from images in any folders, with all folders below them.

    Args:
        category: its name; "all": the name of the folder that holds all images.
        normal, normal_test, abnormal: where normal images, normal test images and defective images are. A defect is
            called as the image's folder.
        masks: where the masks of the defective images are, with the images' names and a suffix of MASK_SUFFIXES.
        mask_defect: "bright" or "dark", how masks show defects.
        test_fraction, test_seed: the share of the normal images that are drawn for the test, and the draw's seed. It
            is used if there are defective images, and no `normal_test`.

    Raises:
        UserError: a place holds no images, or some that can't be read; an image has two roles; images and masks are
            not one to one.
    """
    passed: list[Path] = []
    found = {
        key: _images(key, places, passed)
        for key, places in (("data.normal", normal), ("data.normal_test", normal_test), ("data.abnormal", abnormal))
        if places
    }
    if "data.normal" not in found:
        raise UserError("data.normal is not set: give the folder of normal images, or data.root instead of folders")
    _check_roles(found)
    train = list(found["data.normal"])
    good, defective = list(found.get("data.normal_test", {})), found.get("data.abnormal", {})
    mask_of: dict[Path, Path | None] = dict.fromkeys(defective)
    if masks:
        mask_of |= _pair(defective, _images("data.masks", masks, passed), {*train, *good})
    elif stray := [path for path in defective if _is_mask_beside(path, defective)]:
        raise UserError(f"{stray[0]}: it seems to be a mask beside its image; move masks away and give data.masks=DIR")
    notes = []
    if defective and not good:
        train, good = _drawn(train, test_fraction, test_seed)
        notes.append(
            f"data.test_fraction={test_fraction}: {len(good)} of {len(train) + len(good)} normal images are test "
            f"images, drawn with data.test_seed={test_seed}"
        )
    root = common_root(normal, normal_test, abnormal, masks)
    names = [category] if isinstance(category, str) else list(category)
    if len(names) > 1:
        raise UserError(f"data.category={names}: data.normal describes one category; give one name")
    name = readable(root.name or "images") if names == ["all"] else readable(str(names[0]))
    data = DataSet(root, [Sample(path, name, "good", 0, None) for path in sorted(train)], [])
    data.test = [Sample(path, name, "good", 0, None) for path in sorted(good)]
    dark = mask_defect == "dark"
    data.test += [Sample(path, name, defective[path], 1, mask_of[path], dark) for path in sorted(defective)]
    data.notes = [*notes, *missing_notes(data.train, data.test), *passed_notes(passed)]
    return data


def common_root(*keys: Places) -> Path:
    """The folder that holds all places, as it follows from their names."""
    folders = []
    for place in (place for places in keys for place in ([places] if isinstance(places, str) else places or ())):
        fixed = path = absolute(place)
        while glob.has_magic(str(fixed)) and not fixed.exists():
            fixed = fixed.parent
        folders.append(fixed.parent if fixed == path and fixed.suffix.lower() in IMAGE_SUFFIXES else fixed)
    return Path(os.path.commonpath(folders))


def _images(key: str, places: Places, passed: list[Path]) -> dict[Path, str]:
    """{image: name of its kind}: the folders between the place and the image, or the place's own name. Files that are
    no images are added to `passed`.

    Raises UserError for a place without images, and for images that can't be read or are found twice.
    """
    kinds: dict[Path, str] = {}
    for place in [places] if isinstance(places, str) else places or ():
        expanded = absolute(place)
        paths = [expanded] if expanded.exists() else _matching(expanded)
        count = len(kinds)
        for path in paths:
            found = walk(path) if path.is_dir() else classified([path])
            check_readable(found)
            passed += found.others
            for image in found.images:
                if image in kinds:
                    raise UserError(f"{image}: {key} names this image twice; remove one of its places")
                between = image.parent.relative_to(path) if path.is_dir() else Path()
                below = between != Path()
                kinds[image] = readable(between.as_posix() if below else image.parent.name)
                if key == "data.abnormal" and means_normal(Path(kinds[image]).name):
                    raise UserError(
                        f"{image.parent}: its images would count as defective, and its name means normal ones; rename "
                        "the folder, or give it as data.normal_test"
                    )
        if len(kinds) == count:
            what = "no images" if paths else "no such folder"
            raise UserError(f"{key}={place}: {what} ({' '.join(IMAGE_SUFFIXES)}); give a folder, a list or a pattern")
    return kinds


def _matching(pattern: Path) -> list[Path]:
    return sorted(Path(path) for path in glob.glob(str(pattern), recursive=True))  # noqa: PTH207  an absolute pattern


def _check_roles(found: dict[str, dict[Path, str]]) -> None:
    """Raise UserError for an image, by its place or its content, that is in two of the groups."""
    groups = {key: {Path(os.path.realpath(path)): path for path in images} for key, images in found.items()}
    sizes: dict[int, set[str]] = {}
    for key, images in groups.items():
        for path in images:
            sizes.setdefault(path.stat().st_size, set()).add(key)
    seen: dict[bytes, tuple[str, Path]] = {}
    places: dict[Path, str] = {}
    for key, images in groups.items():
        for real, path in images.items():
            if (other := places.setdefault(real, key)) != key:
                raise UserError(f"{path}: {other} and {key} both contain this image; give them different folders")
            if len(sizes[real.stat().st_size]) > 1:
                with real.open("rb") as file:
                    first, same = seen.setdefault(hashlib.file_digest(file, "sha256").digest(), (key, path))
                if first != key:
                    raise UserError(f"{path}: the same picture as {same}, which is in {first}; remove one of both")


def _drawn(images: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """The images for training, and at least one for the test if the share is above 0."""
    images = sorted(images)
    count = max(1, round(share * len(images))) if share else 0
    if count >= len(images):
        raise UserError(f"data.normal: {len(images)} image is too few for training and test; give data.normal_test=DIR")
    drawn = set(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
    return [x for i, x in enumerate(images) if i not in drawn], [x for i, x in enumerate(images) if i in drawn]


def _is_mask_beside(path: Path, images: Iterable[Path]) -> bool:
    stems = (path.stem.removesuffix(suffix) for suffix in MASK_SUFFIXES if suffix and path.stem.endswith(suffix))
    return any(path.with_name(stem + suffix) in images for stem in stems for suffix in IMAGE_SUFFIXES)


def _pair(images: dict[Path, str], masks: dict[Path, str], normal: set[Path]) -> dict[Path, Path | None]:
    """{image: mask}. Of several masks with an image's name, the one in a folder of the image's kind.

    Masks of normal images are not read. Raises UserError for an image without a mask, and for a mask without an image.
    """
    if both := [path for path in masks if path in images or path in normal]:
        raise UserError(f"{both[0]}: data.masks contains this image; give the masks a folder of their own")
    named: dict[str, list[Path]] = {}
    for mask in masks:
        named.setdefault(mask.stem, []).append(mask)
    found: dict[Path, list[Path]] = {}
    for image, kind in images.items():
        all_found = [mask for suffix in MASK_SUFFIXES for mask in named.get(image.stem + suffix, ())]
        same_kind = [mask for mask in all_found if Path(masks[mask]).name == Path(kind).name]
        found[image] = same_kind if len(all_found) > 1 and same_kind else all_found
    of_normal = {path.stem + suffix for path in normal for suffix in MASK_SUFFIXES}
    all_masks = [mask for mask in masks if mask.stem not in of_normal]
    return one_to_one(found, all_masks, "data.masks")
