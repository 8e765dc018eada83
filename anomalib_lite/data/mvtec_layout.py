"""What readers share: the root and the categories that a user names, the MVTec layout, and notes about what was read.

The layout is CATEGORY/{train/good, test/good, test/DEFECT, ground_truth/DEFECT}; hidden files and folders are ignored.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anomalib_lite.data.image_files import IMAGE_SUFFIXES
from anomalib_lite.data.image_folders import Listing, holds_images, listing, means_normal
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import readable

Counts = Mapping[str, tuple[int, int, int]]  # per category: train, normal test, defective test


# --- root and categories ---------------------------------------------------------------------------------------------


def existing_root(root: str | Path | None) -> Path:
    """`data.root` as an absolute path. Raises UserError if it is not set or no folder."""
    if root is None or str(root) == "":
        raise UserError("data.root is not set: give the folder that holds the data set, as in data.root=DIR")
    path = Path(root).expanduser().absolute()
    if path.name == "..":
        path = path.resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; set data.root to the folder that holds the data set")
    return path


def choose(category: str | Sequence[str], available: list[str], base: Path, hint: str = "") -> list[str]:
    """The categories that `data.category` names, in its order; "all" is sorted.

    Raises UserError for a name that is not available; the message ends with `hint`.
    """
    if not available:
        hint = hint or "; set data.root to the folder that holds the categories (CATEGORY/train/good)"
        raise UserError(f"{base}: no category in this folder{hint}")
    if category == "all":
        return sorted(available)
    names = [readable(str(name)) for name in ([category] if isinstance(category, str | int) else category or [])]
    if not names or "" in names:
        raise UserError("data.category is empty: give a name, a list such as [bottle,cable], or all")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.category names '{name}' {names.count(name)} times: name each category once")
        if name not in available:
            near = difflib.get_close_matches(name.lower(), available, n=1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            listed = ", ".join(sorted(available))
            raise UserError(f"{base}: no category '{name}'{guess} (data.category: {listed}){hint}")
    return names


def category_folders(base: Path) -> dict[str, Path]:
    """The folders below `base` that hold `train` or `test`, by name."""
    return {readable(p.name): p for p in listing(base).folders if (p / "train").is_dir() or (p / "test").is_dir()}


def unread_notes(base: Path, read: Iterable[Path], why: str) -> list[str]:
    """A note on images in the folder of the data set, or in folders of it, that are in none of the folders `read`."""
    found = listing(base)
    read = set(read)
    if base in read:
        return []
    passed = [path.name for path in found.folders if path not in read and holds_images(path)]
    notes = [f"{len(passed)} folders with images are not read, {why}: {', '.join(passed[:5])}"] if passed else []
    loose = [*found.images, *found.unread]
    if loose:
        notes.append(f"{len(loose)} files beside the categories are not read (first: {loose[0]})")
    return notes


# --- images and masks ------------------------------------------------------------------------------------------------


def read_folders(base: Path, folders: Mapping[str, Path], train: bool = True) -> DataSet:
    """The categories, each in its folder, with notes on what can't be measured and on files that are not used.

    Without `train`, test images alone.

    Raises UserError for an image in the wrong place or of a kind that can't be read, for a folder whose name means
    normal images to a person, and for images and masks that are not one to one.
    """
    data, unused = DataSet(base, [], []), []
    for category, folder in folders.items():
        passed: list[Path] = []
        _check_beside(folder, passed)
        data.train += _read_train(folder / "train", category, passed) if train else []
        data.test += _read_test(folder, category, passed)
        if passed:
            unused.append(f"{category}: {len(passed)} files or folders are not used (first: {passed[0]})")
    data.notes = missing_notes(data) + unused
    return data


def _images(folder: Path, passed: list[Path]) -> list[Path]:
    """The images of a folder that holds nothing but images; other files are added to `passed`.

    Raises UserError for images in folders below it, and for those that can't be read.
    """
    found = listing(folder)
    _check_readable(found)
    for below in found.folders:
        if holds_images(below):
            raise UserError(f"{below}: images in a folder below {folder} are not read; move them into {folder}")
        passed.append(below)
    passed += found.others
    return found.images


def _check_readable(found: Listing) -> None:
    for path, message in found.unread.items():
        raise UserError(f"{path}: {message}")


def _read_train(train: Path, category: str, passed: list[Path]) -> list[Sample]:
    found = listing(train)
    _check_readable(found)
    for folder in found.folders:
        if folder.name != "good" and holds_images(folder):
            if means_normal(folder.name):
                raise UserError(f"{folder}: the folder of normal images must be called 'good'; rename it")
            raise UserError(
                f"{folder}: train may hold only the folder 'good' (training is on normal images); move it out"
            )
    if found.images:
        raise UserError(f"{found.images[0]}: normal training images belong in {train / 'good'}; move them there")
    passed += found.others
    good = [Sample(path, category, "good", 0, None) for path in _images(train / "good", passed)]
    if not good:
        raise UserError(f"{train / 'good'}: no training images ({' '.join(IMAGE_SUFFIXES)}); put normal ones there")
    return good


def _read_test(category_folder: Path, category: str, passed: list[Path]) -> list[Sample]:
    test, ground_truth = category_folder / "test", category_folder / "ground_truth"
    found, gt_found = listing(test), listing(ground_truth)
    _check_readable(found)
    _check_readable(gt_found)
    if found.images:
        raise UserError(
            f"{found.images[0]}: test images belong in {test / 'good'} or {test / 'DEFECT'}; move them there"
        )
    if gt_found.images:
        raise UserError(f"{gt_found.images[0]}: masks belong in {ground_truth / 'DEFECT'}; move them there")
    passed += found.others + gt_found.others
    samples = []
    for folder in found.folders:
        defective, images = folder.name != "good", _images(folder, passed)
        if images and defective and means_normal(folder.name):
            raise UserError(
                f"{folder}: its images would count as defective, and its name means normal ones; rename it to 'good', "
                f"or to another name such as '{folder.name}_defect' if they are defective"
            )
        # Masks of good images are empty by definition, some conversions write them all the same: they are not read.
        paired = defective and ground_truth.is_dir()
        masks = _pair(images, ground_truth / folder.name, passed) if paired else dict.fromkeys(images)
        samples += [Sample(path, category, readable(folder.name), int(defective), masks[path]) for path in images]
    for folder in gt_found.folders:
        if folder.name == "good":
            passed += [folder] * holds_images(folder)
        elif not (test / folder.name).is_dir() and (stray := _images(folder, passed)):
            raise UserError(
                f"{stray[0]}: a mask for no image ({test / folder.name} is missing); add its images or remove it"
            )
    return samples


def _check_beside(folder: Path, passed: list[Path]) -> None:
    """Add what lies in a category's folder beside the three that are read to `passed`.

    Raises UserError for a folder with images whose name differs from theirs only in case or separators.
    """
    known = {"train": "train", "test": "test", "groundtruth": "ground_truth"}
    found = listing(folder)
    for below in found.folders:
        if below.name in known.values() or not holds_images(below):
            continue
        if right := known.get(re.sub(r"[\W_]", "", below.name.lower())):
            raise UserError(f"{below}: the folder must be called '{right}'; rename it")
        passed.append(below)
    passed += [*found.images, *found.unread]


def _pair(images: list[Path], folder: Path, passed: list[Path]) -> dict[Path, Path | None]:
    """The mask of each image by name: STEM_mask or STEM, any image suffix. Raises UserError unless it is one to one."""
    masks: dict[str, list[Path]] = {}
    for mask in _images(folder, passed):
        masks.setdefault(mask.stem, []).append(mask)
    found = {image: masks.get(f"{image.stem}_mask", []) + masks.get(image.stem, []) for image in images}
    pairs = one_to_one(found, folder)
    used = set(pairs.values())
    if stray := [mask for same_stem in masks.values() for mask in same_stem if mask not in used]:
        raise UserError(
            f"{stray[0]}: a mask for no image (none of that name in test/{folder.name}); add it or remove it"
        )
    return dict(pairs)


def one_to_one(found: Mapping[Path, Sequence[Path]], place: Path | str) -> dict[Path, Path]:
    """The one mask of each image. Raises UserError for an image with none or several, and for a mask of two images."""
    image_of: dict[Path, Path] = {}
    for image, masks in found.items():
        if not masks:
            raise UserError(f"{image}: no mask for this defective image; add {image.stem}_mask.png to {place}")
        if len(masks) > 1:
            raise UserError(f"{image}: two masks, {masks[0]} and {masks[1]}; remove one")
        if other := image_of.get(masks[0]):
            raise UserError(f"{masks[0]}: one mask for {other.name} and {image.name}; give each image its own")
        image_of[masks[0]] = image
    return {image: mask for mask, image in image_of.items()}


# --- notes -----------------------------------------------------------------------------------------------------------


def missing_notes(data: DataSet) -> list[str]:
    """Notes on what can't be measured with the test images at hand."""
    notes = []
    for category in dict.fromkeys(s.category for s in data.train):
        test = [s for s in data.test if s.category == category]
        if not test:
            notes.append(f"{category}: no test images, nothing can be measured")
        elif all(s.label for s in test):
            notes.append(f"{category}: no good test images, image AUROC can't be computed")
        if any(s.label for s in test) and not any(s.mask for s in test):
            notes.append(f"{category}: no ground_truth, pixel metrics are left out")
    return notes


def count_notes(data: DataSet, official: Counts) -> list[str]:
    """Notes on categories whose numbers of images differ from the official ones."""
    notes = []
    for category in dict.fromkeys(s.category for s in data.train):
        labels = [s.label for s in data.test if s.category == category]
        counts = (sum(s.category == category for s in data.train), labels.count(0), labels.count(1))
        differing = [
            f"{number} {kind} images, officially {right}"
            for number, right, kind in zip(
                counts, official[category], ("train", "good test", "defective test"), strict=True
            )
            if number != right
        ]
        if differing:
            notes.append(f"{category}: {'; '.join(differing)}")
    return notes


def absent_notes(data: DataSet, official: Counts, title: str) -> list[str]:
    """A note on the official categories that are not on disk, if there are any."""
    absent = sorted(set(official) - {s.category for s in data.train})
    listed = f"{len(absent)} of {title}'s {len(official)} categories are not on disk: {', '.join(absent)}"
    return [listed] if absent else []
