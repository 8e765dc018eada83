"""Data sets that a list of images describes, and the reader of those in a CSV file with one row per image."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from anomalib_lite.data.image_folders import means_normal
from anomalib_lite.data.mvtec_layout import choose, existing_root
from anomalib_lite.data.reader_notes import missing_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import absolute, readable

COLUMNS = ("path", "category", "label", "split", "mask")


def read_table(
    root: str | Path | None, category: str | Sequence[str], table: str | Path | None, mask_defect: str = "bright"
) -> DataSet:
    """The rows of a CSV file with the columns path, category, label, split and mask.

    Paths are relative to `root`, or to the table's folder. The label is a word for normal images (good, ok, normal or
    0) or the name of a defect. The split is train or test. The mask may be empty, but pixel metrics
    need those of all defective images of a category. Defective training images are left out with a note.

    Raises:
        UserError: a column is missing; a row has an unknown split, no label, a file that is missing, or another row's
            image; a category has no normal training images.
    """
    if not table:
        raise UserError("data.table is not set: give the CSV file that lists the images")
    file = absolute(table)
    base = existing_root(root) if root else file.parent
    header, rows = table_rows(file, COLUMNS, "add the column")
    names = choose(category, list(dict.fromkeys(readable(row["category"]) for _, row in rows)), file, "; see its rows")

    entries = [
        (where, row["split"].strip().lower(), _sample(base, row, where, mask_defect == "dark"))
        for where, row in rows
        if readable(row["category"]) in names
    ]
    data = listed(base, names, entries, file)
    data.notes += _mask_notes([(where, sample) for where, part, sample in entries if part == "test" and sample.label])
    if further := [name for name in header if name not in COLUMNS]:
        data.notes.append(f"{file.name}: columns that are not used: {', '.join(further)}")
    return data


def listed(base: Path, names: Sequence[str], entries: Iterable[tuple[str, str, Sample]], source: Path) -> DataSet:
    """The data set of listed images, in the order of the categories `names`.

    Args:
        entries: where the list names the image, "train" or "test", and the image. Defective training images are left
            out with a note. source: the list.

    Raises:
        UserError: an image is listed twice, or a category has no normal training images.
    """
    data, left_out, seen = DataSet(base, [], []), 0, dict[Path, str]()
    for where, part, sample in entries:
        if other := seen.get(sample.path):
            raise UserError(f"{where}: {sample.path} is in {other} already; remove one")
        seen[sample.path] = where
        if part == "test":
            data.test.append(sample)
        elif sample.label:
            left_out += 1
        else:
            data.train.append(sample)
    for name in names:
        if not any(sample.category == name for sample in data.train):
            raise UserError(f"{source}: no normal training images of '{name}'; list some, or leave the category out")
    for samples in (data.train, data.test):
        samples.sort(key=lambda sample: (names.index(sample.category), sample.label, sample.path))
    if left_out:
        data.notes.append(f"{source.name}: {left_out} defective training images left out")
    data.notes += missing_notes(data.train, data.test)
    return data


def table_rows(file: Path, columns: Sequence[str], cure: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The header of a CSV file, and ("FILE line N", row) of each row.

    Raises UserError if it is no such file, lacks a column (the message ends with `cure`), or has a row of another
    length.
    """
    try:
        reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline=""))
        rows = [(f"{file} line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV in UTF-8 ({error}); {cure}") from None
    header = list(reader.fieldnames or [])
    if not set(columns) <= set(header):
        raise UserError(f"{file}: its header must be {','.join(columns)}, not {','.join(header) or 'nothing'}; {cure}")
    for where, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{where}: {len(header)} fields are needed; correct the line")
    return header, rows


def file_below(base: Path, text: str | Path, where: str) -> Path:
    """The file below `base` that a list names by this text; UserError, which begins with `where`, for any other."""
    path = base / text
    if ".." in Path(text).parts or not path.is_relative_to(base):
        raise UserError(f"{where}: {text} leads out of {base}; correct the path, or give another data.root")
    if not path.is_file():
        raise UserError(f"{where}: {path} is missing; restore the file, or remove it from the list")
    return path


def _mask_notes(defective: Sequence[tuple[str, Sample]]) -> list[str]:
    """The first defective test image without a mask of each category that has masks of others: pixel metrics need the
    masks of all.
    """
    with_masks = {sample.category for _, sample in defective if sample.mask}
    missing = {s.category: f"{where}: {s.path}" for where, s in reversed(defective) if not s.mask}
    return [
        f"{place} has no mask, so '{category}' has no pixel metrics; add it"
        for category, place in sorted(missing.items())
        if category in with_masks
    ]


def _sample(base: Path, row: dict[str, str], where: str, dark: bool) -> Sample:
    split, label = row["split"].strip().lower(), row["label"].strip()
    if split not in ("train", "test"):
        raise UserError(f"{where}: split={row['split']!r} must be train or test; correct the line")
    if not label:
        raise UserError(f"{where}: the label is empty; give good, or the name of the defect")
    normal = label == "0" or means_normal(label)
    if not row["path"].strip():
        raise UserError(f"{where}: the path is empty; correct the line")
    paths = {key: file_below(base, row[key], where) for key in ("path", "mask") if row[key].strip()}
    if normal and "mask" in paths:
        raise UserError(f"{where}: a normal image with a mask; correct the label, or leave the mask empty")
    return Sample(
        paths["path"],
        readable(row["category"]),
        "good" if normal else readable(label),
        int(not normal),
        paths.get("mask"),
        dark,
    )
