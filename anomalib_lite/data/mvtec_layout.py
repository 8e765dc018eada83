"""What readers share: the root and the categories that a user names, and the MVTec layout with its variants.

The layout is CATEGORY/{train/good, test/good, test/DEFECT, ground_truth/DEFECT}; hidden files and folders are ignored.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from anomalib_lite.data.image_files import IMAGE_SUFFIXES
from anomalib_lite.data.image_folders import check_readable, holds_images, listing, means_normal
from anomalib_lite.data.masks import read_saturations
from anomalib_lite.data.reader_notes import missing_notes, passed_notes, unused_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import absolute, readable


class Layout(NamedTuple):
    """What is where in a category's folder.

    Attributes:
        test, masks: the folders of the kinds of test images, and of their masks.
        good: the name of the folders of normal images.
        defects: the file with the defects' saturation thresholds. Where there is one, each image has a folder of masks,
            DEFECT/STEM/*.png, one for each defect.
        unused: folders of further images, and why they are not used.
    """

    test: str = "test"
    masks: str = "ground_truth"
    good: str = "good"
    defects: str = ""
    unused: Mapping[str, str] = {}


PLAIN = Layout()
VALIDATION = {"validation": "they are normal images for validation, and training uses those of train"}
PRIVATE = dict.fromkeys(
    ("test_private", "test_private_mixed"), "they have no labels; the benchmark's server evaluates them"
)
#: by the name of the data set, those that differ from the MVTec layout
LAYOUTS = {
    "mvtec_ad_2": Layout("test_public", "test_public/ground_truth", unused=VALIDATION | PRIVATE),
    "mvtec_loco": Layout(defects="defects_config.json", unused=VALIDATION),
    "btad": Layout(good="ok"),
}


# --- root and categories ---------------------------------------------------------------------------------------------


def existing_root(root: str | Path | None) -> Path:
    """`data.root` as an absolute path without "..". Raises UserError if it is not set or no folder."""
    if root is None or str(root) == "":
        raise UserError("data.root is not set: give the folder that holds the data set, as in data.root=DIR")
    path = absolute(root)
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
            bare = f"[{','.join(map(str, names))}]"
            if isinstance(category, list) and bare in available:
                quoted = f"'data.category=\"{bare}\"'"
                raise UserError(f"{base}: no category '{name}'; for the folder {bare} give quotes too: {quoted}")
            near = difflib.get_close_matches(name.lower(), available, n=1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            listed = ", ".join(sorted(available))
            raise UserError(f"{base}: no category '{name}'{guess} (data.category: {listed}){hint}")
    return names


def category_folders(base: Path, layout: Layout = PLAIN) -> dict[str, Path]:
    """The folders below `base` that hold training or test images, by name."""
    parts = ("train", layout.test)
    return {readable(p.name): p for p in listing(base).folders if any((p / part).is_dir() for part in parts)}


# --- images and masks ------------------------------------------------------------------------------------------------


def read_folders(base: Path, folders: Mapping[str, Path], train: bool = True, layout: Layout = PLAIN) -> DataSet:
    """The categories, each in its folder, with notes on what can't be measured and on files that are not used.

    Without `train`, test images alone.

    Raises UserError for an image in the wrong place or of a kind that can't be read, for a folder whose name means
    normal images to a person, and for images and masks that are not one to one.
    """
    data, unused = DataSet(base, [], []), list[str]()
    for category, folder in folders.items():
        passed: list[Path] = []
        _check_beside(folder, passed, layout)
        data.train += _read_train(folder / "train", category, passed, layout.good) if train else []
        data.test += _read_test(folder, category, passed, layout)
        unused += passed_notes(passed, category)
    data.notes = [*missing_notes(data.train, data.test), *unused_notes(folders.values(), layout.unused), *unused]
    return data


def _images(folder: Path, passed: list[Path]) -> list[Path]:
    """The images of a folder that holds nothing but images; other files are added to `passed`.

    Raises UserError for images in folders below it, and for those that can't be read.
    """
    found = listing(folder)
    check_readable(found)
    for below in found.folders:
        if holds_images(below):
            raise UserError(f"{below}: images in a folder below {folder} are not read; move them into {folder}")
        passed.append(below)
    passed += found.others
    return found.images


def _read_train(train: Path, category: str, passed: list[Path], good: str) -> list[Sample]:
    found = listing(train)
    check_readable(found)
    for folder in found.folders:
        if folder.name != good and holds_images(folder):
            if means_normal(folder.name):
                raise UserError(f"{folder}: the folder of normal images must be called '{good}'; rename it")
            raise UserError(
                f"{folder}: train may hold only the folder '{good}' (training is on normal images); move it out"
            )
    if found.images:
        raise UserError(f"{found.images[0]}: normal training images belong in {train / good}; move them there")
    passed += found.others
    samples = [Sample(path, category, "good", 0, None) for path in _images(train / good, passed)]
    if not samples:
        raise UserError(f"{train / good}: no training images ({' '.join(IMAGE_SUFFIXES)}); put normal ones there")
    return samples


def _read_test(category_folder: Path, category: str, passed: list[Path], layout: Layout) -> list[Sample]:
    test, ground_truth = category_folder / layout.test, category_folder / layout.masks
    found, gt_found = listing(test), listing(ground_truth)
    check_readable(found)
    check_readable(gt_found)
    if found.images:
        raise UserError(
            f"{found.images[0]}: test images belong in {test / layout.good} or {test / 'DEFECT'}; move them there"
        )
    if gt_found.images:
        raise UserError(f"{gt_found.images[0]}: masks belong in {ground_truth / 'DEFECT'}; move them there")
    passed += found.others + gt_found.others
    samples = []
    paired = ground_truth.is_dir()
    saturations = read_saturations(category_folder / layout.defects) if layout.defects and paired else ()
    for folder in (each for each in found.folders if each != ground_truth):
        defective, images = folder.name != layout.good, _images(folder, passed)
        if images and defective and means_normal(folder.name):
            raise UserError(
                f"{folder}: its images would count as defective, and its name means normal ones; rename it to "
                f"'{layout.good}', or to another name such as '{folder.name}_defect' if they are defective"
            )
        # Masks of good images are empty by definition, some conversions write them all the same: they are not read.
        if not defective:
            samples += [Sample(path, category, "good", 0, None) for path in images]
            continue
        masks = _pair(images, ground_truth / folder.name, passed, layout) if paired else dict.fromkeys(images)
        name = readable(folder.name)
        samples += [Sample(path, category, name, 1, masks[path], saturations=saturations) for path in images]
    for folder in gt_found.folders:
        if folder.name == layout.good:
            passed += [folder] * holds_images(folder)
        elif not (test / folder.name).is_dir():
            _pair([], folder, passed, layout)
    return samples


def _check_beside(folder: Path, passed: list[Path], layout: Layout) -> None:
    """Add what lies in a category's folder beside the three that are read to `passed`.

    Raises UserError for a folder with images whose name differs from theirs only in case or separators.
    """
    known = {re.sub(r"[\W_]", "", name): name for name in ("train", layout.test, layout.masks)}
    found = listing(folder)
    for below in found.folders:
        if below.name in (*known.values(), *layout.unused) or not holds_images(below):
            continue
        if right := known.get(re.sub(r"[\W_]", "", below.name.lower())):
            raise UserError(f"{below}: the folder must be called '{right}'; rename it")
        passed.append(below)
    passed += [*found.images, *found.unread]


def _masks(folder: Path, passed: list[Path], layout: Layout) -> list[Path]:
    """The masks of one kind of defect: files, or folders of files."""
    if not layout.defects:
        return _images(folder, passed)
    found = listing(folder)
    check_readable(found)
    if found.images:
        raise UserError(f"{found.images[0]}: the masks of an image belong in {folder / 'STEM'}; move them there")
    for below in found.folders:
        if not _images(below, passed):
            raise UserError(f"{below}: no mask in the folder of an image's masks; restore its masks or remove it")
    passed += found.others
    return found.folders


def _pair(images: list[Path], folder: Path, passed: list[Path], layout: Layout) -> dict[Path, Path | None]:
    """The mask of each image by name: STEM_mask or STEM, any image suffix. Raises UserError unless it is one to one."""
    masks: dict[str, list[Path]] = {}
    for mask in _masks(folder, passed, layout):
        masks.setdefault(mask.stem, []).append(mask)
    found = {image: masks.get(f"{image.stem}_mask", []) + masks.get(image.stem, []) for image in images}
    all_masks = [mask for same_stem in masks.values() for mask in same_stem]
    return one_to_one(found, all_masks, folder, "{}/000.png" if layout.defects else "{}_mask.png")


def one_to_one(
    found: Mapping[Path, Sequence[Path]], all_masks: Sequence[Path], place: Path | str, name: str = "{}_mask.png"
) -> dict[Path, Path | None]:
    """The one mask of each image. Raises UserError for an image with none or several, and for a mask of two or of none.

    Args:
        found: each image with its masks. all_masks: these, and those of no image.
        place: where masks belong, under a `name` made of the image's.
    """
    image_of: dict[Path, Path] = {}
    for image, masks in found.items():
        if not masks:
            used = {mask for of_image in found.values() for mask in of_image}
            advice = _how_to_add(image, [mask for mask in all_masks if mask not in used], place, name)
            raise UserError(f"{image}: no mask for this defective image; {advice}")
        if len(masks) > 1:
            raise UserError(f"{image}: two masks, {masks[0]} and {masks[1]}; remove one")
        if other := image_of.get(masks[0]):
            raise UserError(f"{masks[0]}: one mask for {other.name} and {image.name}; give each image its own")
        image_of[masks[0]] = image
    if stray := [mask for mask in all_masks if mask not in image_of]:
        raise UserError(f"{stray[0]}: a mask for no image; add an image of its name, or remove the mask")
    return {image: mask for mask, image in image_of.items()}


def _how_to_add(image: Path, unused: Sequence[Path], place: Path | str, name: str) -> str:
    """How the image gets its mask. A mask of no image that seems to be named after this one is to be renamed."""
    wanted = name.format(image.stem)
    if named := [mask for mask in unused if re.search(rf"(?<!\d){re.escape(image.stem)}(?!\d)", mask.stem)]:
        right = image.stem if named[0].is_dir() else f"{wanted.removesuffix('.png')}{named[0].suffix}"
        return f"found {named[0].name} in {place}; rename it to {right}"
    other = f" ({unused[0].name} in it belongs to no image)" if unused else ""
    return f"add {wanted} to {place}{other}"
