"""Readers: from a folder on disk to a DataSet. Each takes (root, category) with a name, a list of names, or "all"."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomalib_lite.data import mvtec_layout as layout
from anomalib_lite.data.image_folders import listing
from anomalib_lite.data.own_folders import Places, read_own_folders
from anomalib_lite.data.reader_notes import Counts, absent_notes, count_notes, unread_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.data.tables import file_below, listed, table_rows
from anomalib_lite.errors import UserError
from anomalib_lite.paths import readable

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
COUNTS = {"mvtec": MVTEC, "visa": VISA}  # of the official categories, by the data set's name
VISA_COLUMNS = ["object", "split", "label", "image", "mask"]


def read_mvtec(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """MVTec AD. Only official categories; counts that differ from the official ones become notes."""
    return read_official(root, category, MVTEC, "MVTec AD")


def read_visa(root: str | Path | None, category: str | Sequence[str], split_csv: str = "1cls.csv") -> DataSet:
    """VisA: raw with `split_csv/<split_csv>` at the root, or in the MVTec layout at the root or in `1cls/`."""
    base = layout.existing_root(root)
    table = base / "split_csv" / split_csv
    if table.is_file():
        return _read_visa_raw(base, category, table)
    for below in ("1cls", ""):
        if layout.category_folders(base / below).keys() & VISA.keys():
            return read_official(root, category, VISA, "VisA", below=below)
    raise UserError(
        f"{base}: neither VisA's raw layout (split_csv/{split_csv} is missing) nor a converted one "
        "(CATEGORY/train/good); set data.root to the folder that holds one of them"
    )


def read_folder(
    root: str | Path | None, category: str | Sequence[str], normal: Places = None, **folders_of: Any
) -> DataSet:
    """Any categories in the MVTec layout; without `ground_truth` masks are None. The root may be the one category.

    Instead of a root, `normal` and further arguments of `read_own_folders` name the folders of one category.
    """
    if normal is not None and root is not None:
        raise UserError(f"data.root={root}: data.normal names the folders already; leave one of both out")
    if normal is not None:
        return read_own_folders(category, normal, **folders_of)
    if given := [key for key in ("normal_test", "abnormal", "masks") if folders_of.get(key)]:
        raise UserError(
            f"data.{given[0]}={folders_of[given[0]]}: goes with data.normal=DIR; give the normal images too"
        )
    base = layout.existing_root(root)
    folders = (
        {readable(base.name or base.resolve().name): base}
        if (base / "train").is_dir()
        else layout.category_folders(base)
    )
    data = layout.read_folders(base, {name: folders[name] for name in layout.choose(category, list(folders), base)})
    if category == "all":
        data.notes += unread_notes(base, folders.values(), "having neither train nor test in them")
    return data


def read_test_set(root: str | Path | None, category: Sequence[str], like: str | None = None) -> DataSet:
    """The test images of those categories that are there, for a run that is trained already.

    They are in the MVTec layout, or in that of the data set `like`, where it has its own. The root may be the one
    category. Nothing below `train` is read.
    """
    base, own = layout.existing_root(root), layout.LAYOUTS.get(like or "", layout.PLAIN)
    alone = len(category) == 1 and (base / own.test).is_dir()
    folders = {category[0]: base} if alone else layout.category_folders(base, own)
    names = [name for name in category if name in folders]
    places = f"CATEGORY/{own.test}/{own.good} and CATEGORY/{own.test}/DEFECT"
    if not names:
        raise UserError(
            f"{base}: none of the run's categories, {', '.join(category)}; name its folder like one, and put test "
            f"images into {places}"
        )
    data = layout.read_folders(base, {name: folders[name] for name in names}, train=False, layout=own)
    if not data.test:
        raise UserError(f"{base}: no test images; put them into {places}")
    return data


def read_as_trained(
    root: str | Path | None,
    category: str | Sequence[str],
    reader: Callable[..., DataSet],
    names: Sequence[str],
    **for_reader: Any,
) -> DataSet:
    """What the reader returns, for a run that is trained already on categories of these names.

    A single category may be called as its folder, which may have another name by now. It gets the run's name, on which
    depends which images are drawn.
    """
    data = reader(root, category, **for_reader)
    found = {sample.category for sample in [*data.train, *data.test]}
    if len(names) != 1 or len(found) != 1 or found == set(names):
        return data
    (old,), (new,) = names, found
    train, test = ([replace(sample, category=old) for sample in samples] for samples in (data.train, data.test))
    notes = [old + note.removeprefix(new) if note.startswith(f"{new}: ") else note for note in data.notes]
    return replace(data, train=train, test=test, notes=notes)


def read_official(
    root: str | Path | None,
    category: str | Sequence[str],
    official: Counts,
    title: str,
    own: layout.Layout = layout.PLAIN,
    below: str = "",
) -> DataSet:
    """A data set in the MVTec layout, or in its own, of which the categories and their counts are known.

    The categories are in the root, or in the folder `below` it. Counts that differ from the official ones become notes.
    """
    base = layout.existing_root(root)
    folders = layout.category_folders(base / below, own)
    hint = ""
    if (base / "train").is_dir():
        hint = f"; it seems to be a category itself, set data.root to {base.parent}"
    elif own == layout.PLAIN and folders.keys() - official.keys():
        hint = f"; data=folder reads categories that are not {title}'s"
    elif own != layout.PLAIN and not folders.keys() & official.keys():
        hint = f"; set data.root to the folder that holds {title}'s {', '.join(official)}"
    names = layout.choose(category, [name for name in folders if name in official], base, hint)
    data = layout.read_folders(base, {name: folders[name] for name in names}, layout=own)
    data.notes += count_notes(data, official)
    if category == "all":
        data.notes += unread_notes(base / below, [folders[name] for name in names], f"being no category of {title}")
        data.notes += absent_notes(data, official, title)
    return data


# --- VisA's raw layout -----------------------------------------------------------------------------------------------


def _read_visa_raw(base: Path, category: str | Sequence[str], table: Path) -> DataSet:
    """The rows of the table whose objects are chosen; a table lists all objects, a disk may hold some of them."""
    available = [p.name for p in listing(base).folders if p.name in VISA and (p / "Data").is_dir()]
    names = layout.choose(category, available, base, "" if available else "; VisA's raw layout is OBJECT/Data/Images")
    in_table = set[Path]()

    def entries() -> Iterator[tuple[str, str, Sample]]:
        for where, row in table_rows(table, VISA_COLUMNS, "take the file that comes with VisA")[1]:
            if row["object"] not in VISA:
                raise UserError(f"{where}: {row['object']!r} is no object of VisA; correct the line")
            if row["object"] in names:
                sample = _visa_sample(base, row, where)
                in_table.add(sample.path)
                yield where, row["split"], sample

    data = listed(base, names, entries(), table)  # the 2cls splits train on defective images too; nothing here does
    for name in names:
        images = base / name / "Data" / "Images"
        kinds = (listing(images / kind).images for kind in ("Normal", "Anomaly"))
        if unlisted := [path for of_kind in kinds for path in of_kind if path not in in_table]:
            data.notes.append(f"{name}: {len(unlisted)} images are not in {table.name} (first: {unlisted[0]})")
    if table.name == "1cls.csv":
        data.notes += count_notes(data, VISA)
    if category == "all":
        data.notes += absent_notes(data, VISA, "VisA")
    return data


def _visa_sample(base: Path, row: dict[str, str], where: str) -> Sample:
    """The sample of one row, whose paths are relative to the root; `where` names file and line in a UserError."""
    if row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly"):
        raise UserError(
            f"{where}: split must be train or test, label normal or anomaly, not {row['split']!r} and {row['label']!r}"
        )
    defective = row["label"] == "anomaly"
    if row["mask"] and not defective:
        raise UserError(f"{where}: a normal image with a mask; correct the label, or leave the mask empty")
    paths = {}
    for key in ("image", "mask") if defective else ("image",):
        if not row[key]:
            raise UserError(f"{where}: the {key} of a row may not be empty; correct the line")
        paths[key] = file_below(base, row[key], where)
    defect = "bad" if defective else "good"  # the name that the converted layout uses
    return Sample(paths["image"], row["object"], defect, int(defective), paths.get("mask"))
