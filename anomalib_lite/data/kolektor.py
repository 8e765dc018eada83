"""Readers of KolektorSDD and KolektorSDD2, where every image has a mask beside it: an empty one if it is normal."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anomalib_lite.data.cores import threads
from anomalib_lite.data.image_folders import check_readable, holds_images, listing
from anomalib_lite.data.masks import read_mask
from anomalib_lite.data.mvtec_layout import choose, existing_root
from anomalib_lite.data.reader_notes import count_notes, missing_notes, passed_notes, total_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError

SDD, SDD2 = "kolektor_sdd", "kolektor_sdd2"  # each is a category of its own
SDD_TOTALS = (347, 52)  # normal and defective images
SDD2_COUNTS = {SDD2: (2085, 894, 110)}
EVERY = 5  # of KolektorSDD's items: the normal images of every fifth one are test images


def read_kolektor_sdd(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """KolektorSDD (Tabernik et al., 2019): kos01/Part0.jpg and kos01/Part0_label.bmp, of 50 items.

    Its official split is a cross-validation with supervision. The one for training on normal images is ours: all
    defective images and the normal ones of every fifth item are test images.
    """
    base = existing_root(root)
    items = [folder for folder in listing(base).folders if re.fullmatch(r"kos\d+", folder.name)]
    if not items:
        raise UserError(f"{base}: no folders kos01, kos02, ...; set data.root to the folder that holds them")
    choose(category, [SDD], base)
    passed: list[Path] = []
    pairs = {image: mask for item in items for image, mask in _pairs(item, "_label.bmp", passed).items()}
    samples = _samples(SDD, pairs)
    held = items[EVERY - 1 :: EVERY]
    train = [sample for sample in samples if not sample.label and sample.path.parent not in held]
    test = [sample for sample in samples if sample.label or sample.path.parent in held]
    data = _data_set(base, train, test, passed, items)
    defective = sum(sample.label for sample in samples)
    counts = {"normal": len(samples) - defective, "defective": defective}
    data.notes += total_notes(SDD, counts, SDD_TOTALS)
    names = ", ".join(item.name for item in held)
    data.notes.append(
        f"{SDD}: the split is ours, there is no official one for training on normal images: the normal images of every "
        f"fifth item are test images ({names})"
    )
    return data


def read_kolektor_sdd2(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """KolektorSDD2 (Božič et al., 2021): {train,test}/10000.png and 10000_GT.png.

    The defective training images are left out with a note.
    """
    base = existing_root(root)
    parts = [base / part for part in ("train", "test")]
    if not parts[0].is_dir():
        raise UserError(f"{base}: no folder train; set data.root to the folder that holds train and test")
    choose(category, [SDD2], base)
    passed: list[Path] = []
    train, test = (_samples(SDD2, _pairs(folder, "_GT.png", passed)) for folder in parts)
    data = _data_set(base, [sample for sample in train if not sample.label], test, passed, parts)
    if left_out := len(train) - len(data.train):
        data.notes.append(f"{SDD2}: {left_out} defective training images left out")
    data.notes += count_notes(data, SDD2_COUNTS)
    return data


def _data_set(base: Path, train: list[Sample], test: list[Sample], passed: list[Path], read: Sequence[Path]) -> DataSet:
    if not train:
        raise UserError(f"{read[0]}: no normal training images, which have an empty mask; restore them")
    data = DataSet(base, train, sorted(test, key=lambda sample: (sample.label, sample.path)))
    passed += [folder for folder in listing(base).folders if folder not in read and holds_images(folder)]
    data.notes = [*missing_notes(data.train, data.test), *passed_notes(passed)]
    return data


def _pairs(folder: Path, ending: str, passed: list[Path]) -> dict[Path, Path]:
    """{image: mask} of a folder; a mask is called as its image, with another ending.

    Other files, and copies that KolektorSDD2's archive contains by mistake, are added to `passed`.

    Raises UserError for an image without a mask and for a mask without an image.
    """
    found, suffix = listing(folder), Path(ending).stem
    check_readable(found)
    copies = [path for path in found.images if path.stem.endswith("(copy)")]
    passed += [*found.others, *found.folders, *copies]
    images, masks = dict[str, Path](), dict[str, Path]()
    for path in found.images:
        group, stem = (masks, path.stem.removesuffix(suffix)) if path.stem.endswith(suffix) else (images, path.stem)
        if path not in copies and (other := group.setdefault(stem, path)) != path:
            raise UserError(f"{path}: a second file for {other.name}; remove one")
    if alone := sorted(images.keys() - masks.keys()):
        mask = f"{alone[0]}{ending}"
        raise UserError(f"{images[alone[0]]}: no mask {mask} beside it, which is empty for a normal image; restore it")
    if alone := sorted(masks.keys() - images.keys()):
        raise UserError(f"{masks[alone[0]]}: a mask for no image; restore the image or remove the mask")
    return {image: masks[stem] for stem, image in images.items()}


def _samples(category: str, pairs: Mapping[Path, Path]) -> list[Sample]:
    """An image is defective if its mask marks a pixel: every mask is decoded."""
    with ThreadPoolExecutor(min(16, 4 * threads())) as pool:
        defective = list(pool.map(lambda mask: bool(read_mask(mask)[0].any()), pairs.values()))
    return [
        Sample(image, category, "defect" if marked else "good", int(marked), mask if marked else None)
        for (image, mask), marked in zip(pairs.items(), defective, strict=True)
    ]
