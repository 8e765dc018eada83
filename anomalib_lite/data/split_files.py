"""Published split files: read into entries, matched with a data set's images, and written; see `split_formats`.

Wherever a path was written, `CLASS/.../FILE` at its end says which image below the data root is meant. Where that is
true of several images, the path below the root says it. VisA's images are found in its raw layout by paths of the
converted one, and the other way round. Test entries are passed over.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.data.split_formats import FORMATS, KNOWN, Entry, Image, detect, parse
from anomalib_lite.errors import UserError
from anomalib_lite.paths import replacing


def read(file: Path, format: str = "auto") -> tuple[list[Entry], str]:
    """The training entries, and the format. Raises UserError naming file and entry."""
    if format != "auto" and format not in FORMATS:
        raise UserError(f"split.format={format}: choose auto, {', '.join(FORMATS)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file}: no text in UTF-8; give {KNOWN}") from None
    except OSError as error:
        raise UserError(f"split.path={file}: {error.strerror or error}; give the file of the split") from None
    if not text.strip():
        raise UserError(f"{file}: the file is empty; give one that lists training images")
    format = detect(file, text) if format == "auto" else format
    entries = parse(file, text, format)
    if not entries:
        raise UserError(f"{file}: no training entries in its {len(text.splitlines())} lines; give the training list")
    return entries, format


def select(
    data: DataSet, file: Path, entries: list[Entry], prune: bool = False, anomalous: bool = False
) -> tuple[list[Sample], dict[str, str], list[Entry]]:
    """The samples that the entries name, or leave over, in the data set's order; per class its last "FILE ENTRY"; and
    the entries of classes that the data set does not hold.

    Raises UserError for a path outside the root, a missing or doubled file, a test image, a defective image (unless
    `anomalous` admits it), and a class that is left without normal images.
    """
    index = _index(data)
    position = {name: i for i, name in enumerate(dict.fromkeys(s.category for s in data.train))}
    tested = {s.path for s in data.test}
    named: dict[Path, tuple[Sample, str]] = {}
    lines: dict[str, str] = {}
    others: list[Entry] = []
    for entry in entries:
        where = f"{file} {entry.where}"
        sample = _match(data, index, position, entry, where)
        if sample is None:
            others.append(entry)
            continue
        if sample.path in named:
            raise UserError(f"{where}: {entry.path} is in {named[sample.path][1]} already; remove one")
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
        named[sample.path] = sample, entry.where
        lines[sample.category] = where
    if prune:
        train = [s for s in data.train if s.path not in named]
    else:
        train = [named[s.path][0] for s in data.train + data.test if s.path in named]
    for category in position:
        if not any(s.category == category and not s.label for s in train):
            if prune:
                raise UserError(f"{lines[category]}: leaves out the last training image of '{category}'; keep one")
            listed = ",".join(sorted({s.category for s in train if not s.label})) or "others"
            raise UserError(
                f"{file}: no normal training image of '{category}'; add some, or set data.category=[{listed}]"
            )
    train.sort(key=lambda s: position[s.category])
    return train, {c: lines.get(c, str(file)) for c in position}, others


def write(file: Path, format: str, data: DataSet, train: list[Sample]) -> None:
    """The split as a file; meta and csv hold the test set too, prune what `train` lacks of `data.train`."""
    if (format == "prune") != file.name.startswith("prune_") and format in ("prune", "list"):
        raise UserError(f"{file}: a file called prune_* lists images to leave out (--format prune), no other does")
    if format == "prune":
        retained = {s.path for s in train}
        train = [s for s in data.train if s.path not in retained]

    images_of = Counter(_short(s.path, s.category, data.root) for s in data.train + data.test)

    def relative(path: Path | None, of: Sample) -> str:
        if path and images_of[_short(of.path, of.category, data.root)] > 1:
            return path.relative_to(data.root).as_posix()
        return _short(path, of.category, data.root) if path else ""

    text = FORMATS[format].write(
        Image(split, s.category, s.defect, s.label, relative(s.path, s), relative(s.mask, s))
        for split, samples in (("train", train), ("test", data.test))
        for s in samples
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(text, encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}; choose another file") from None


# --- which image an entry means --------------------------------------------------------------------------------------


def _below(path: Path, category: str, root: Path) -> tuple[Path, tuple[str, ...]]:
    """The category's folder, and the parts of `path` below it. The root itself may be that folder."""
    parts = path.relative_to(root.parent).parts
    start = parts.index(category, 1) if category in parts[1:] else 0
    return root.parent.joinpath(*parts[: start + 1]), parts[start + 1 :]


def _short(path: Path, category: str, root: Path) -> str:
    """CLASS/.../FILE."""
    return "/".join((category, *_below(path, category, root)[1]))


def _index(data: DataSet) -> dict[str, list[Sample]]:
    """Samples by their path below the root, if it contains the class; by CLASS/.../FILE, which several may have; and by
    what VisA's other layout would call it where that is one sample's alone.
    """
    paths: dict[str, list[Sample]] = {}
    shorts: dict[str, list[Sample]] = {}
    others: dict[str, list[Sample]] = {}
    for part, samples in (("train", data.train), ("test", data.test)):
        for sample in samples:
            folder, (*folders, name) = _below(sample.path, sample.category, data.root)
            shorts.setdefault(_short(sample.path, sample.category, data.root), []).append(sample)
            if folder != data.root:
                paths[sample.path.relative_to(data.root).as_posix()] = [sample]
            if folders[:2] == ["Data", "Images"]:
                other = f"{part}/{'bad' if sample.label else 'good'}"
            else:
                other = f"Data/Images/{'Anomaly' if sample.label else 'Normal'}"
            others.setdefault(f"{sample.category}/{other}/{name}", []).append(sample)
    return {key: found for key, found in others.items() if len(found) == 1} | shorts | paths


def _match(
    data: DataSet, index: dict[str, list[Sample]], categories: dict[str, int], entry: Entry, where: str
) -> Sample | None:
    """The entry's sample; None if its class is not one of these categories."""
    parts = [part for part in entry.path.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{where}: {entry.path} leads out of the data root {data.root}; remove the entry")
    wanted = list(categories) if entry.category is None else [entry.category]
    for i in range(len(parts)):
        if found := [sample for sample in index.get("/".join(parts[i:]), []) if sample.category in wanted]:
            return _only(found, data, entry, where)
    starts = [i for i, part in enumerate(parts) if part in wanted]
    category, rest = entry.category, parts[starts[-1] + 1 :] if starts else parts
    if category is None:  # the folder before train/, test/ or VisA's Data/
        marks = [i for i, part in enumerate(parts) if part in ("train", "test", "Data") and i > 0]
        category = parts[marks[0] - 1] if marks else parts[starts[-1]] if starts else None
    if category is None:
        raise UserError(f"{where}: {entry.path} is outside the data root {data.root}; paths end in CLASS/.../FILE")
    if category not in categories:
        return None
    if not starts and (found := index.get("/".join((category, *rest)), [])):  # relative to the class's folder
        return _only(found, data, entry, where)
    if not starts and entry.path.startswith("/"):
        raise UserError(f"{where}: {entry.path} is outside the data root {data.root}; paths end in CLASS/.../FILE")
    first = next(s for s in data.train if s.category == category)
    lost = _below(first.path, category, data.root)[0].joinpath(*rest)
    what = "is no image that the data set holds" if lost.exists() else "is missing"
    raise UserError(f"{where}: {lost} {what}; restore the file, or remove the entry")


def _only(found: list[Sample], data: DataSet, entry: Entry, where: str) -> Sample:
    """The sample, if there is one. Raises UserError for several."""
    if len(found) > 1:
        both = f"{found[0].path} and {found[1].path}"
        raise UserError(f"{where}: {entry.path} may be {both}; give the path below the data root {data.root}")
    return found[0]
