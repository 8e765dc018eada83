"""Readers: from a folder on disk to a DataSet. Each takes (root, category) with a name, a list of names, or "all"."""

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
Counts = dict[str, tuple[int, int, int]]  # train, normal test, defective test
# fmt: off
MVTEC: Counts = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}
VISA: Counts = {
    "candle": (900, 100, 100), "capsules": (542, 60, 100), "cashew": (450, 50, 100), "chewinggum": (453, 50, 100),
    "fryum": (450, 50, 100), "macaroni1": (900, 100, 100), "macaroni2": (900, 100, 100), "pcb1": (904, 100, 100),
    "pcb2": (901, 100, 100), "pcb3": (905, 101, 100), "pcb4": (904, 101, 100), "pipe_fryum": (450, 50, 100),
}
# fmt: on


def read_mvtec(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """MVTec AD. Only official categories; counts that differ from the official ones become notes."""
    base = _existing(root)
    return _read_official(base, base, category, MVTEC, "MVTec AD")


def read_visa(root: str | Path | None, category: str | Sequence[str], split_csv: str = "1cls.csv") -> DataSet:
    """VisA: raw with `split_csv/<split_csv>` at the root, or in the MVTec layout at the root or in `1cls/`."""
    base = _existing(root)
    table = base / "split_csv" / split_csv
    if table.is_file():
        return _read_visa_raw(base, category, table)
    for converted in (base / "1cls", base):
        if set(_category_folders(converted)) & set(VISA):
            return _read_official(base, converted, category, VISA, "VisA")
    raise UserError(
        f"{base}: neither VisA's raw layout (split_csv/{split_csv} is missing) nor a converted one "
        "(CATEGORY/train/good); set data.root to the folder that holds one of them"
    )


def read_folder(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """Any categories in the MVTec layout; without `ground_truth` masks are None. The root may be the one category."""
    base = _existing(root)
    if (base / "train").is_dir():
        name = base.name or base.resolve().name
        folders = {name: base}
    else:
        folders = {name: base / name for name in _category_folders(base)}
    names = _choose(category, list(folders), base)
    return _read_folders(base, {name: folders[name] for name in names})


# --- what the readers share ------------------------------------------------------------------------------------------


def _existing(root: str | Path | None) -> Path:
    if root is None or str(root) == "":
        raise UserError("data.root is not set: give the folder that holds the data set, as in data.root=DIR")
    path = Path(root).expanduser().absolute()
    if path.name == "..":
        path = path.resolve()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; set data.root to the folder that holds the data set")
    return path


def _visible(folder: Path) -> list[Path]:
    """Entries in order of name without hidden ones (.ipynb_checkpoints, ._000.png); none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)


def _images(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.suffix.lower() in EXTENSIONS and p.is_file()]


def _folders(folder: Path) -> list[Path]:
    return [p for p in _visible(folder) if p.is_dir()]


def _category_folders(base: Path) -> list[str]:
    return [p.name for p in _folders(base) if (p / "train").is_dir() or (p / "test").is_dir()]


def _choose(category: str | Sequence[str], there: list[str], base: Path, hint: str = "") -> list[str]:
    """The categories asked for, in the order asked; "all" is sorted. Raises UserError for names that are not there."""
    if not there:
        hint = hint or "; set data.root to the folder that holds the categories (CATEGORY/train/good)"
        raise UserError(f"{base}: no category in this folder{hint}")
    if category == "all":
        return sorted(there)
    names = [str(category)] if isinstance(category, str | int) else [str(name) for name in category or []]
    if not names or "" in names:
        raise UserError("data.category is empty: give a name, a list such as [bottle,cable], or all")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.category names '{name}' {names.count(name)} times: name each category once")
        if name not in there:
            near = difflib.get_close_matches(name.lower(), there, n=1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{base}: no category '{name}'{guess} (data.category: {', '.join(sorted(there))}){hint}")
    return names


def _read_official(base: Path, folder: Path, category: str | Sequence[str], official: Counts, title: str) -> DataSet:
    """Categories in the MVTec layout below `folder`, of which the names and counts are known."""
    found = _category_folders(folder)
    hint = ""
    if (base / "train").is_dir():
        hint = f"; it seems to be a category itself, set data.root to {base.parent}"
    elif set(found) - set(official):
        hint = f"; data=folder reads categories that are not {title}'s"
    names = _choose(category, [name for name in found if name in official], base, hint)
    data = _read_folders(base, {name: folder / name for name in names})
    data.notes += _compare_counts(data, official) + (_absent(names, official, title) if category == "all" else [])
    return data


def _absent(names: list[str], official: Counts, title: str) -> list[str]:
    absent = sorted(set(official) - set(names))
    return [f"{len(absent)} of {title}'s {len(official)} categories are not on disk: {', '.join(absent)}"] * bool(
        absent
    )


def _compare_counts(data: DataSet, official: Counts) -> list[str]:
    notes = []
    for category in dict.fromkeys(s.category for s in data.train):
        labels = [s.label for s in data.test if s.category == category]
        counts = (sum(s.category == category for s in data.train), labels.count(0), labels.count(1))
        differing = [
            f"{n} {what} images, officially {right}"
            for n, right, what in zip(counts, official[category], ("train", "good test", "defective test"), strict=True)
            if n != right
        ]
        notes += [f"{category}: {'; '.join(differing)}"] * bool(differing)
    return notes


# --- the MVTec layout ------------------------------------------------------------------------------------------------


def _read_folders(base: Path, folders: dict[str, Path]) -> DataSet:
    data = DataSet(base, [], [])
    for category, folder in folders.items():
        data.train += _read_train(folder, category)
        test = _read_test(folder, category)
        data.test += test
        data.notes += _describe(category, test)
    return data


def _describe(category: str, test: list[Sample]) -> list[str]:
    """Notes on what can't be measured with this test set."""
    notes = []
    if not test:
        notes.append(f"{category}: no test images, nothing can be measured")
    elif not any(s.label == 0 for s in test):
        notes.append(f"{category}: no good test images, image AUROC can't be computed")
    if any(s.label for s in test) and not any(s.mask for s in test):
        notes.append(f"{category}: no ground_truth, pixel metrics are left out")
    return notes


def _read_train(folder: Path, category: str) -> list[Sample]:
    train = folder / "train"
    for sub in _folders(train):
        if sub.name != "good" and _images(sub):
            raise UserError(f"{sub}: train may hold only the folder 'good' (training is on normal images); move it out")
    if loose := _images(train):
        raise UserError(f"{loose[0]}: normal training images belong in {train / 'good'}; move them there")
    good = [Sample(p, category, "good", 0, None) for p in _images(train / "good")]
    if not good:
        raise UserError(f"{train / 'good'}: no training images ({' '.join(sorted(EXTENSIONS))}); put normal ones there")
    return good


def _read_test(folder: Path, category: str) -> list[Sample]:
    test, truth = folder / "test", folder / "ground_truth"
    if loose := _images(test):
        raise UserError(f"{loose[0]}: test images belong in {test / 'good'} or {test / 'DEFECT'}; move them there")
    samples = []
    for sub in _folders(test):
        images = _images(sub)
        if sub.name == "good":
            samples += [Sample(p, category, "good", 0, None) for p in images]
            continue
        masks = _pair(images, truth / sub.name) if truth.is_dir() else dict.fromkeys(images)
        samples += [Sample(p, category, sub.name, 1, masks[p]) for p in images]
    # Masks of good images are empty by definition, some conversions write them all the same: they are not looked at.
    for sub in _folders(truth):
        if sub.name != "good" and not (test / sub.name).is_dir() and (stray := _images(sub)):
            raise UserError(
                f"{stray[0]}: a mask for no image ({test / sub.name} is missing); add its images or remove it"
            )
    return samples


def _pair(images: list[Path], folder: Path) -> dict[Path, Path | None]:
    """The mask of each image by name: STEM_mask or STEM, any image extension. UserError unless it is one to one."""
    masks: dict[str, list[Path]] = {}
    for path in _images(folder):
        masks.setdefault(path.stem, []).append(path)
    owner: dict[Path, Path] = {}
    pairs: dict[Path, Path | None] = {}
    for image in images:
        found = masks.get(image.stem + "_mask", []) + masks.get(image.stem, [])
        if not found:
            raise UserError(f"{image}: no mask for this defective image; add {folder / (image.stem + '_mask.png')}")
        if len(found) > 1:
            raise UserError(f"{image}: two masks, {found[0].name} and {found[1].name} in {folder}; remove one")
        if found[0] in owner:
            raise UserError(
                f"{found[0]}: one mask for {owner[found[0]].name} and {image.name}; give each image its own"
            )
        owner[found[0]] = image
        pairs[image] = found[0]
    if stray := [p for paths in masks.values() for p in paths if p not in owner]:
        raise UserError(
            f"{stray[0]}: a mask for no image (none of that name in test/{folder.name}); add it or remove it"
        )
    return pairs


# --- VisA's raw layout -----------------------------------------------------------------------------------------------


def _read_visa_raw(base: Path, category: str | Sequence[str], table: Path) -> DataSet:
    """Rows `object,split,label,image,mask`, paths relative to the root. Rows of other objects are passed over."""
    there = [p.name for p in _folders(base) if p.name in VISA and (p / "Data").is_dir()]
    names = _choose(category, there, base, "; VisA's raw layout is OBJECT/Data/Images" if not there else "")
    data = DataSet(base, [], [])
    left_out = 0
    for line, row in _rows(table):
        if row["object"] not in names:
            continue
        split, sample = _visa_sample(base, row, f"{table} line {line}")
        if split == "test":
            data.test.append(sample)
        elif sample.label == 0:
            data.train.append(sample)
        else:
            left_out += 1  # the 2cls splits train on defective images, too; nothing here does
    for name in names:
        if not any(s.category == name for s in data.train):
            raise UserError(f"{table}: no training images of '{name}'; take the table that comes with the data")
    position = {name: i for i, name in enumerate(names)}
    for samples in (data.train, data.test):
        samples.sort(key=lambda s: (position[s.category], s.defect != "good", s.path))
    if left_out:
        data.notes.append(f"{table.name}: {left_out} defective training images left out")
    for name in names:
        data.notes += _describe(name, [s for s in data.test if s.category == name])
    if table.name == "1cls.csv":
        data.notes += _compare_counts(data, VISA)
    if category == "all":
        data.notes += _absent(names, VISA, "VisA")
    return data


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    wanted = ["object", "split", "label", "image", "mask"]
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # newline="": csv itself handles CRLF
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: not a CSV in UTF-8 ({error}); take the file that comes with VisA") from None
    header = reader.fieldnames or []
    if not set(wanted) <= set(header):
        raise UserError(f"{table}: its header must be {','.join(wanted)}, not {','.join(header) or 'nothing'}")
    for line, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{table} line {line}: {len(wanted)} fields are needed; mend the line")
    return rows


def _visa_sample(base: Path, row: dict[str, str], where: str) -> tuple[str, Sample]:
    """(split, sample) of one row; `where` names file and line in a UserError."""
    if row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly"):
        raise UserError(
            f"{where}: split must be train or test, label normal or anomaly, not {row['split']!r} and {row['label']!r}"
        )
    defective = row["label"] == "anomaly"
    if not row["image"] or (defective and not row["mask"]):
        raise UserError(f"{where}: the {'mask' if row['image'] else 'image'} of a row may not be empty; mend the line")
    for relative in filter(None, (row["image"], row["mask"] if defective else "")):
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise UserError(f"{where}: {relative} leads out of the root; paths must be relative to it")
        if not (base / relative).is_file():
            raise UserError(f"{where}: {base / relative} is missing; restore the file or remove the line")
    mask = base / row["mask"] if defective else None
    defect = "bad" if defective else "good"  # the name that the converted layout uses
    return row["split"], Sample(base / row["image"], row["object"], defect, int(defective), mask)
