"""The published formats of split files, each as a pair of functions: text to entries, and images to text.

jsonl  JSON lines, as UniAD and its descendants read them: {"filename", "label", "label_name", "clsname"}
meta   ADer's meta.json: {"train": {CLASS: [{"img_path", "mask_path", "cls_name", "specie_name", "anomaly"}]}, "test"}
csv    a header with at least a path (VisA's: object,split,label,image,mask)
list   one path per line
prune  the same, of images to leave out (TailedCore's prune_good.txt); only a file called prune_* is taken for one
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_lite.errors import UserError

PATH = ("filename", "img_path", "image_path", "image", "path")
CLASS = ("clsname", "cls_name", "object", "category", "class")
LABEL, PART = ("label", "anomaly"), ("split", "phase", "set")
NORMAL = {"0", "0.0", "false", "good", "normal", "ok", "none", ""}
PARTS = {"train": True, "training": True, "test": False, "testing": False, "val": False, "valid": False, "": True}
KNOWN = "JSON lines, ADer's meta.json, a CSV with a header, a path list, or prune_*"
Rows = Iterator[tuple[str, dict[str, Any]]]  # where an entry is in its file, such as "line 4", and its fields


@dataclass(frozen=True)
class Entry:
    """A training image as a file names it; `where` it does so, such as "line 4" or "train.bottle[3]"."""

    where: str
    path: str
    category: str | None = None
    anomalous: bool = False


class Image(NamedTuple):
    """An image to be written; `path` and `mask` end in CLASS/.../FILE, `mask` is empty where there is none."""

    part: str  # train or test
    category: str
    defect: str
    label: int
    path: str
    mask: str


def parse(file: Path, text: str, format: str) -> list[Entry]:
    """The training entries of the file; those of its test set are left out. Raises UserError naming file and entry."""
    entries = []
    for where, fields in FORMATS[format].parse(file, text):
        path, label, part = (next((fields[k] for k in keys if k in fields), None) for keys in (PATH, LABEL, PART))
        if not isinstance(path, str) or not path.strip():
            raise UserError(f"{file} {where}: no path in this entry (it is looked for in {', '.join(PATH)})")
        trained = PARTS.get(_word(part))
        if trained is None:
            raise UserError(f"{file} {where}: {part!r} is neither train nor test; correct the entry")
        category = next((str(fields[key]) for key in CLASS if fields.get(key) not in (None, "")), None)
        if trained:
            entries.append(Entry(where, path.strip(), category, _word(label) not in NORMAL))
    return entries


def _word(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()


def detect(file: Path, text: str) -> str:
    """The format of a text that is not empty, by its first line and for prune by the file's name."""
    first = text.strip().partition("\n")[0].strip()
    if first.startswith("{"):
        try:
            content = json.loads(first)
        except ValueError:
            return "meta"
        return "meta" if isinstance(content.get("train"), dict) else "jsonl"
    if set(PATH) & {name.strip(' "').lower() for name in first.split(",")}:
        return "csv"
    if "/" in first.replace("\\", "/") and not first.startswith("["):
        return "prune" if file.name.startswith("prune_") else "list"
    line = text[: text.index(first)].count("\n") + 1
    raise UserError(f"{file} line {line}: not a format that is read here; give {KNOWN} (split.format names it)")


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _parse_jsonl(file: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields, why = json.loads(line), ""
        except (ValueError, RecursionError) as error:
            fields, why = None, f" ({error})"
        if not isinstance(fields, dict):
            raise UserError(f"{file} line {number}: no JSON object{why}; correct the line, or set split.format")
        yield f"line {number}", fields


def _write_jsonl(images: Iterable[Image]) -> str:
    keys = ("filename", "label", "label_name", "clsname")
    rows = [(i.path, i.label, "defective" if i.label else "good", i.category) for i in images if i.part == "train"]
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


# --- ADer's meta.json ------------------------------------------------------------------------------------------------


def _parse_meta(file: Path, text: str) -> Rows:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: no JSON ({error.msg}); correct the file") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply for a split; give {KNOWN}") from None
    train = content.get("train") if isinstance(content, dict) else None
    if not isinstance(train, dict):
        raise UserError(f'{file}: no {{"train": {{CLASS: [...]}}}} in it; give ADer\'s meta.json, or set split.format')
    for category, entries in train.items():
        if not isinstance(entries, list) or not all(isinstance(fields, dict) for fields in entries):
            raise UserError(f"{file}: train.{category} is no list of entries; correct the file")
        for number, fields in enumerate(entries):
            yield f"train.{category}[{number}]", {CLASS[-1]: category} | fields


def _write_meta(images: Iterable[Image]) -> str:
    content: dict[str, dict[str, list[dict[str, Any]]]] = {"train": {}, "test": {}}
    for image in images:
        entry = {"img_path": image.path, "mask_path": image.mask, "cls_name": image.category}
        more = {"specie_name": image.defect, "anomaly": image.label}
        content[image.part].setdefault(image.category, []).append(entry | more)
    return json.dumps(content, indent=4) + "\n"


# --- CSV -------------------------------------------------------------------------------------------------------------


def _parse_csv(file: Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        if not set(names) & set(PATH):
            raise UserError(
                f"{file} line 1: no column for paths ({', '.join(PATH)}); give a header, or set split.format"
            )
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                fields = f"{len(names)} fields are needed, as in the header"
                raise UserError(f"{file} line {reader.line_num}: {fields}; correct the line")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: no CSV ({error}); correct the line") from None


def _write_csv(images: Iterable[Image]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["object", "split", "label", "image", "mask"])
    table.writerows([i.category, i.part, "anomaly" if i.label else "normal", i.path, i.mask] for i in images)
    return out.getvalue()


# --- path lists ------------------------------------------------------------------------------------------------------


def _parse_list(file: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        path = line.strip()
        if path and "/" not in path.replace("\\", "/"):
            raise UserError(
                f"{file} line {number}: {path[:60]!r} is no path CLASS/.../FILE; correct it, or set split.format"
            )
        if path:
            yield f"line {number}", {"path": path}


def _write_list(images: Iterable[Image]) -> str:
    paths = [image.path for image in images if image.part == "train"]
    if odd := [path for path in paths if path != path.strip() or "\n" in path]:
        raise UserError(f"{odd[0]!r}: a name that a path list can't hold; choose --format meta")
    return "".join(f"{path}\n" for path in paths)


class Format(NamedTuple):
    parse: Callable[[Path, str], Rows]
    write: Callable[[Iterable[Image]], str]


#: a list of images to leave out is written of those images
FORMATS = {
    "jsonl": Format(_parse_jsonl, _write_jsonl),
    "meta": Format(_parse_meta, _write_meta),
    "csv": Format(_parse_csv, _write_csv),
    "list": Format(_parse_list, _write_list),
    "prune": Format(_parse_list, _write_list),
}
