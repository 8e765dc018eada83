"""Published split files: read into entries, matched with a data set's images, and written.

jsonl  JSON lines, as UniAD and its descendants read them: {"filename", "label", "label_name", "clsname"}
meta   ADer's meta.json: {"train": {CLASS: [{"img_path", "mask_path", "cls_name", "specie_name", "anomaly"}]}, "test"}
csv    a header with at least a path (VisA's: object,split,label,image,mask)
list   a path a line
prune  the same, of images to leave out (TailedCore's prune_good.txt); only a file called prune_* is taken for one

Wherever a path was written, `CLASS/.../FILE` at its end says which image below the data root is meant. VisA's images
are found in its raw layout by paths of the converted one, and the other way round. Test entries are passed over.
"""

import bisect
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError

FORMATS = ("jsonl", "meta", "csv", "list", "prune")
PATH = ("filename", "img_path", "image_path", "image", "path")
CLASS = ("clsname", "cls_name", "object", "category", "class")
LABEL, PART = ("label", "anomaly"), ("split", "phase", "set")
NORMAL = {"0", "0.0", "false", "good", "normal", "ok", "none", ""}
PARTS = {"train": True, "training": True, "test": False, "testing": False, "val": False, "valid": False, "": True}
KNOWN = "JSON lines, ADer's meta.json, a CSV with a header, a path list, or prune_*"


@dataclass(frozen=True)
class Entry:
    """A training image as a file names it; `line` is 0 where it can't be told."""

    line: int
    path: str
    category: str | None = None
    anomalous: bool = False


def read(file: Path, format: str = "auto") -> tuple[list[Entry], str]:
    """The training entries, and the format. Raises UserError naming file and line."""
    if format != "auto" and format not in FORMATS:
        raise UserError(f"split.format={format}: choose auto, {', '.join(FORMATS)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"split.path={file}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"split.path={file}: a folder; give the file of the split") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: no text in UTF-8; give {KNOWN}") from None
    except OSError as error:
        raise UserError(f"split.path={file}: {error.strerror or error}") from None
    if not text.strip():
        raise UserError(f"{file} line 1: the file is empty; give one that lists training images")
    format = _detect(file, text) if format == "auto" else format
    parse: dict[str, Callable[[Path, str], Iterator[Entry]]] = {"jsonl": _jsonl, "meta": _meta, "csv": _csv}
    entries = list(parse.get(format, _paths)(file, text))
    if not entries:
        raise UserError(f"{file}: no training entries in its {len(text.splitlines())} lines; give the training list")
    return entries, format


def select(
    data: DataSet, file: Path, entries: list[Entry], prune: bool = False, anomalous: bool = False
) -> tuple[list[Sample], dict[str, str]]:
    """The samples that the entries name, or leave over, in the data set's order; and per class its last "FILE line N".

    Entries of classes that the data set does not hold are passed over.
    Raises UserError for a path outside the root, a missing or doubled file, a test image, a defective image (unless
    `anomalous` admits it), and a class that is left without normal images.
    """
    index = _index(data)
    position = {name: i for i, name in enumerate(dict.fromkeys(s.category for s in data.train))}
    tested = {s.path for s in data.test}
    named: dict[Path, tuple[Sample, int]] = {}
    lines: dict[str, str] = {}
    for entry in entries:
        where = f"{file} line {entry.line}" if entry.line else str(file)
        sample = _match(data, index, position, entry, where)
        if sample is None:
            continue
        if sample.path in named:
            raise UserError(f"{where}: {entry.path} is in line {named[sample.path][1]} already; remove one")
        if prune and sample.path in tested:
            raise UserError(f"{where}: {entry.path} is no training image; remove the line")
        if entry.anomalous or sample.label:
            if not anomalous:
                raise UserError(
                    f"{where}: {entry.path} is defective; remove the entry, or admit such images among training with "
                    "split.anomalous=true"
                )
            sample = sample if sample.label else replace(sample, label=1, defect="anomalous")
        elif sample.path in tested:
            raise UserError(f"{where}: {entry.path} is a test image, and the test set stays whole; remove the entry")
        named[sample.path] = sample, entry.line
        lines[sample.category] = where
    if prune:
        train = [s for s in data.train if s.path not in named]
    else:
        train = [named[s.path][0] for s in data.train + data.test if s.path in named]
    for category in position:
        if not any(s.category == category and not s.label for s in train):
            if prune:
                raise UserError(f"{lines[category]}: leaves out the last training image of '{category}'; keep one")
            end = max(entry.line for entry in entries)
            last = f"{file} lines 1-{end}" if end > 1 else f"{file} line 1"
            there = ",".join(sorted({s.category for s in train if not s.label})) or "others"
            raise UserError(
                f"{last}: no normal training image of '{category}'; add some, or set data.category=[{there}]"
            )
    return sorted(train, key=lambda s: position[s.category]), {c: lines.get(c, str(file)) for c in position}


def write(file: Path, format: str, data: DataSet, train: list[Sample]) -> None:
    """The split as a file; meta and csv hold the test set too, prune what `train` lacks of `data.train`."""

    def place(path: Path | None, sample: Sample) -> str:
        return "/".join((sample.category, *_below(path, sample.category, data.root)[1])) if path else ""

    def plain(samples: list[Sample]) -> str:
        paths = [place(s.path, s) for s in samples]
        if odd := [path for path in paths if path != path.strip() or "\n" in path]:
            raise UserError(f"{odd[0]!r}: a name that a path list can't hold; choose --format meta")
        return "".join(f"{path}\n" for path in paths)

    if (format == "prune") != file.name.startswith("prune_") and format in ("prune", "list"):
        raise UserError(f"{file}: a file called prune_* lists images to leave out (--format prune), no other does")
    parts = (("train", train), ("test", data.test))
    if format == "prune":
        kept = {s.path for s in train}
        text = plain([s for s in data.train if s.path not in kept])
    elif format == "list":
        text = plain(train)
    elif format == "jsonl":
        keys = ("filename", "label", "label_name", "clsname")
        rows = [(place(s.path, s), s.label, "defective" if s.label else "good", s.category) for s in train]
        text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    elif format == "csv":
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["object", "split", "label", "image", "mask"])
        for part, samples in parts:
            for s in samples:
                label = "anomaly" if s.label else "normal"
                table.writerow([s.category, part, label, place(s.path, s), place(s.mask, s)])
        text = out.getvalue()
    else:
        content: dict[str, dict[str, list[dict[str, Any]]]] = {part: {} for part, _ in parts}
        for part, samples in parts:
            for s in samples:
                entry = {"img_path": place(s.path, s), "mask_path": place(s.mask, s), "cls_name": s.category}
                entry |= {"specie_name": s.defect, "anomaly": s.label}  # type: ignore[dict-item]
                content[part].setdefault(s.category, []).append(entry)
        text = json.dumps(content, indent=4) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}; choose another file") from None


# --- which image an entry means --------------------------------------------------------------------------------------


def _below(path: Path, category: str, root: Path) -> tuple[Path, tuple[str, ...]]:
    """The category's folder, and the parts of `path` below it. The root itself may be that folder."""
    parts = path.relative_to(root.parent).parts
    start = parts.index(category, 1) if category in parts[1:] else 0
    return root.parent.joinpath(*parts[: start + 1]), parts[start + 1 :]


def _index(data: DataSet) -> dict[str, Sample]:
    """Samples by CLASS/.../FILE, and by what VisA's other layout would call it where that is one sample's alone."""
    index: dict[str, Sample] = {}
    others: dict[str, list[Sample]] = {}
    for part, samples in (("train", data.train), ("test", data.test)):
        for sample in samples:
            *folders, name = _below(sample.path, sample.category, data.root)[1]
            index["/".join((sample.category, *folders, name))] = sample
            if folders[:2] == ["Data", "Images"]:
                other = f"{part}/{'bad' if sample.label else 'good'}"
            else:
                other = f"Data/Images/{'Anomaly' if sample.label else 'Normal'}"
            others.setdefault(f"{sample.category}/{other}/{name}", []).append(sample)
    return {key: found[0] for key, found in others.items() if len(found) == 1} | index


def _match(
    data: DataSet, index: dict[str, Sample], categories: dict[str, int], entry: Entry, where: str
) -> Sample | None:
    """The entry's sample; None if its class is not one of these categories."""
    parts = [part for part in entry.path.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{where}: {entry.path} leads out of the data root {data.root}; remove the entry")
    wanted = list(categories) if entry.category is None else [entry.category]
    starts = [i for i, part in enumerate(parts) if part in wanted]
    for i in starts:
        if sample := index.get("/".join(parts[i:])):
            return sample
    category, rest = entry.category, parts[starts[-1] + 1 :] if starts else parts
    if category is None:  # the folder before train/, test/ or VisA's Data/
        marks = [i for i, part in enumerate(parts) if part in ("train", "test", "Data") and i > 0]
        category = parts[marks[0] - 1] if marks else parts[starts[-1]] if starts else None
    if category is None:
        raise UserError(f"{where}: {entry.path} is outside the data root {data.root}; paths end in CLASS/.../FILE")
    if category not in categories:
        return None
    if not starts and (sample := index.get("/".join((category, *rest)))):  # relative to the class's folder
        return sample
    if not starts and entry.path.startswith("/"):
        raise UserError(f"{where}: {entry.path} is outside the data root {data.root}; paths end in CLASS/.../FILE")
    first = next(s for s in data.train if s.category == category)
    lost = _below(first.path, category, data.root)[0].joinpath(*rest)
    what = "is no image that the data set holds" if lost.exists() else "is missing"
    raise UserError(f"{where}: {lost} {what}; restore the file, or remove the entry")


# --- formats ---------------------------------------------------------------------------------------------------------


def _detect(file: Path, text: str) -> str:
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


def _entry(fields: dict[Any, Any], where: str, line: int, category: str | None = None) -> Entry | None:
    """An entry of named fields; None for one of the test set."""
    path, label, part = (next((fields[k] for k in keys if k in fields), None) for keys in (PATH, LABEL, PART))
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{where}: no path in this entry (it is looked for in {', '.join(PATH)})")
    of = next((fields[key] for key in CLASS if fields.get(key) not in (None, "")), category)
    trained = PARTS.get(str("" if part is None else part).strip().lower())
    if trained is None:
        raise UserError(f"{where}: {part!r} is neither train nor test; mend the entry")
    anomalous = str("" if label is None else label).strip().lower() not in NORMAL
    return Entry(line, path.strip(), None if of is None else str(of), anomalous) if trained else None


def _jsonl(file: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON object ({error}); mend the line, or set split.format") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: no JSON object; mend the line, or set split.format")
        if entry := _entry(fields, where, number):
            yield entry


def _meta(file: Path, text: str) -> Iterator[Entry]:
    begun: list[int] = []
    starts: list[int] = []  # where objects begin, in the order in which they end
    for token in re.finditer(r'"(?:[^"\\]|\\.)*+"|[{}]', text, re.DOTALL):
        if token[0] == "{":
            begun.append(token.start())
        elif token[0] == "}" and begun:
            starts.append(begun.pop())
    ends = [match.start() for match in re.finditer("\n", text)]
    order = iter(starts)

    def numbered(fields: dict[Any, Any]) -> dict[Any, Any]:  # called for each object as it ends
        return fields | {None: bisect.bisect_left(ends, next(order)) + 1}

    try:
        content = json.loads(text, object_hook=numbered)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: no JSON ({error.msg}); mend the file") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply for a split; give {KNOWN}") from None
    train = content.get("train") if isinstance(content, dict) else None
    if not isinstance(train, dict):
        raise UserError(
            f'{file} line 1: no {{"train": {{CLASS: [...]}}}} in it; give ADer\'s meta.json, or set split.format'
        )
    for category, entries in train.items():
        if category is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(fields, dict) for fields in entries):
            raise UserError(f"{file} line {train[None]}: train.{category} is no list of entries; mend the file")
        for fields in entries:
            line = fields.pop(None)
            if entry := _entry(fields, f"{file} line {line}", line, category):
                yield entry


def _csv(file: Path, text: str) -> Iterator[Entry]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        if not set(names) & set(PATH):
            raise UserError(
                f"{file} line 1: no column for paths ({', '.join(PATH)}); give a header, or set split.format"
            )
        reader.fieldnames = names
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: {len(names)} fields are needed, as in the header; mend the line")
            if entry := _entry(row, where, reader.line_num):
                yield entry
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: no CSV ({error}); mend the line") from None


def _paths(file: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        path = line.strip()
        if not path:
            continue
        if "/" not in path.replace("\\", "/"):
            raise UserError(
                f"{file} line {number}: {path[:60]!r} is no path CLASS/.../FILE; mend it, or set split.format"
            )
        yield Entry(number, path)
