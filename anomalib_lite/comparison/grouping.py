"""Which runs share a table and which share a row, and what tables and rows are called."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli.keys import flat, short_key
from anomalib_lite.comparison.datasets import OFFICIAL, places, titles, versions
from anomalib_lite.comparison.find_runs import Run, dict_at, shorten, to_json
from anomalib_lite.comparison.tables import Row, Table, ordered_shots, shots_text
from anomalib_lite.data.splits import SHOTS
from anomalib_lite.paths import readable

#: categories that the package's defaults were chosen on, and their data set; None: read as data=folder
DEVELOPMENT = {"bottle": "mvtec", "toothbrush": "mvtec", "capsules": "visa", "magnetic_tile": None}
TRANSFORM, MAP_SIZE = "protocol.data.transform", "protocol.data.map_size"
IMAGE_SIZE = f"{TRANSFORM}.resize"
LONGEST = 60  # characters of a list in a note
Conditions = dict[str, Any]  # what the runs of a table share, by its key in result.json


def tables(runs: Sequence[Run]) -> list[Table]:
    """One table per data set, split and protocol, in the order of the runs. Few shots and all images share a table."""
    place_of = places(runs)
    title_of = titles(list(dict.fromkeys(place_of.values())))
    alike: dict[str, tuple[Conditions, list[Run]]] = {}
    for run in runs:
        result = run.result
        conditions = {"data.root": place_of[run][1]} | flat(
            {"split": _split(result), "protocol": {"data": result["protocol"]["data"]}}
        )
        alike.setdefault(to_json([result["dataset"], conditions]), (conditions, []))[1].append(run)
    part_of: dict[Run, tuple[str, Conditions]] = {}
    for key, (conditions, members) in alike.items():
        for run, version in versions(members).items():
            part_of[run] = f"{key} {version}", conditions | {"data.fingerprint": version}
    parts: dict[str, tuple[Conditions, list[Run]]] = {}
    for run in runs:
        parts.setdefault(part_of[run][0], (part_of[run][1], []))[1].append(run)
    made: list[Table] = []
    first: dict[str, tuple[int, Conditions]] = {}
    for conditions, members in parts.values():
        dataset = members[0].result["dataset"]
        number, others = first.setdefault(dataset, (len(made) + 1, conditions))
        where = shorten(str(run.folder) for run in members)
        found = ", ".join(_differences(conditions, others))
        notes = [f"does not compare with table {number}: {found}; here: {where}"] * bool(found)
        rows, repeated = _rows(members)
        categories = sorted({category for row in rows for category in row.runs}, key=_natural)
        notes += [*repeated, *_notes(rows, members, categories), *_development(dataset, categories)]
        name = title_of[place_of[members[0]]]
        made.append(Table(name + _split_title(members), name, rows, categories, notes))
    return made


def _split(result: dict[str, Any]) -> dict[str, Any]:
    """What makes a split another one. The fingerprint covers its files, and one split may have several names.

    Few shots are no other split: they are rows beside those of all images.
    """
    split = result.get("split") or {}
    profile = split.get("profile", split.get("name", "full"))
    profile = "full" if profile == SHOTS else profile
    ignored = ("name", "profile", "path", "format", "tail", "counts", "full_counts")
    return {"profile": profile} | {k: v for k, v in split.items() if k not in ignored and profile != "full"}


def _split_title(runs: Sequence[Run]) -> str:
    """What follows the data set's name in a title: nothing, or ", split exp20 (order reverse; split.seed 1)", or
    ", 1 shot, 4 shots, all images".
    """
    result = runs[0].result
    split, details = result.get("split") or {}, []
    if any(run.shots for run in runs):
        return "".join(f", {shots_text(shots)}" for shots in ordered_shots(run.shots for run in runs))
    if _split(result)["profile"] == "full":
        return ""
    if "imbalance" in split:
        name, order, seed = f"{split.get('profile')}{split['imbalance']:g}", split.get("order"), split.get("seed", 0)
        details += [f"order {', '.join(order) if isinstance(order, list) else order}"] * (order != "size")
        details += [f"split.seed {seed}"] * (seed != 0)
    else:
        name, path = f"{split.get('name')}", split.get("path")
        name += f" {'/'.join(Path(path).parts[-3:])}" if isinstance(path, str) else ""
    return f", split {name}" + f" ({'; '.join(details)})" * bool(details)


def _differences(here: Conditions, there: Conditions) -> Iterator[str]:
    """What differs, with the values. Maps have the images' size unless scoring.map_size says otherwise: then one
    difference stands for both.
    """
    if all(_has_one_step(side) for side in (here, there)):
        here, there = ({**side, **flat(side[TRANSFORM][0], TRANSFORM)} for side in (here, there))
        here, there = ({key: side[key] for key in side if key != TRANSFORM} for side in (here, there))
    differ = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if all(side.get(MAP_SIZE) == side.get(IMAGE_SIZE) for side in (here, there)) and IMAGE_SIZE in differ:
        differ.remove(MAP_SIZE)
    for key in differ:
        values = f" ({_plain(here.get(key))}, there {_plain(there.get(key))})"
        yield f"{key} differs" + values * (key != "data.fingerprint")  # it is a hash


def _has_one_step(conditions: Conditions) -> bool:
    """Whether the images' preparation is a single step, such as our resize: its options differ one by one."""
    transform = conditions.get(TRANSFORM)
    return isinstance(transform, list) and len(transform) == 1 and isinstance(transform[0], dict)


def _plain(value: Any) -> str:
    """A value as a note shows it: a text as it is, as far as it can be printed, and of long lists the beginning."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return readable(text if isinstance(value, str) or len(text) <= LONGEST else f"{text[:LONGEST]}…")


def _rows(runs: list[Run]) -> tuple[list[Row], list[str]]:
    """The rows, labelled and sorted, and a note on runs that a newer one with the same seed replaces."""
    rows: dict[str, Row] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: str(dict_at(run.result, "timing").get("date", ""))):
        method, setting, hyperparameters = run.result["method"], run.result["setting"], run.hyperparameters()
        new = Row(method, setting, hyperparameters, configured=bool(run.config), shots=run.shots)
        row = rows.setdefault(to_json([method, setting, hyperparameters, run.shots]), new)
        for category in run.result["categories"]:
            seeds = row.runs.setdefault(category, {})
            if run.seeds in seeds:
                repeated.append(str(seeds[run.seeds].folder))
            seeds[run.seeds] = run
    note = f"run again with the same seed, the newest counts; left out: {shorten(repeated)}"
    return label(list(rows.values())), [note] * bool(repeated)


def _notes(rows: list[Row], runs: list[Run], categories: list[str]) -> Iterator[str]:
    """What a reader of the table must know: other test images, other scoring, other work on the machine."""
    for category in categories:
        having = [run.result["data"] for run in runs if category in run.result["categories"]]
        counts = sorted({json.dumps(dict_at(data, "test_counts").get(category)) for data in having})
        if len(counts) > 1:
            yield f"{category}: not the same test images in all runs ({shorten(counts)})"
    scoring: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for key, value in row.hyperparameters.items():
            if key.startswith("scoring"):
                scoring.setdefault(key, {}).setdefault(value, []).append(row.full_label)
    for key, values in scoring.items():
        if len(values) > 1:
            rows_by_value = "; ".join(f"{value}: {shorten(labels)}" for value, labels in values.items())
            yield f"{key} differs ({rows_by_value})"
    if mixed := [row.full_label for row in rows if len(_module_versions(row)) > 1]:
        yield f"averaged over runs of several versions of one module (environment.modules): {shorten(mixed)}"
    if mixed := [row.full_label for row in rows if len(_arithmetic(row)) > 1]:
        yield f"averaged over runs in several precisions (environment.precision): {shorten(mixed)}"
    beside = [
        f"{row.label} ({jobs} jobs)" for row in rows if (jobs := max(map(_jobs_beside, row.all_runs()), default=0))
    ]
    if beside:
        yield f"latency and images/s do not compare where other jobs ran on the machine: {shorten(beside)}"
    if any(row.shots for row in rows):
        yield "few shots: runs that differ in seed or split.seed (the draw of the images) are averaged"


def _development(dataset: str, categories: Sequence[str]) -> Iterator[str]:
    """A note on development data. Of images in a folder of a user's own, only the category's name is known."""
    named = [category for category in categories if category in DEVELOPMENT]
    if known := [category for category in named if DEVELOPMENT[category] == dataset]:
        yield f"development data: {', '.join(known)} (defaults were chosen on them)"
    elif named and dataset not in OFFICIAL:
        listed = ", ".join(named)
        yield f"{listed}: names of our development data; if these are its images, defaults were chosen on them"


def _module_versions(row: Row) -> set[str]:
    """The versions of the user's own modules that the row's runs used; runs of earlier versions stored none."""
    used = [dict_at(run.result, "environment", "modules") for run in row.all_runs()]
    return {to_json(modules) for modules in used if modules}


def _arithmetic(row: Row) -> set[str]:
    """In which precisions the row's runs were computed, which `auto` chooses by the device."""
    used = [dict_at(run.result, "environment").get("precision") for run in row.all_runs()]
    return {str(precision) for precision in used if precision}


def _jobs_beside(run: Run) -> int:
    """The number of jobs that ran beside the measurement of the run's latency, as far as it is known."""
    jobs = dict_at(run.result, "timing", "beside").get("jobs")
    return jobs if isinstance(jobs, int) else 0


def label(rows: list[Row]) -> list[Row]:
    """Label the rows and sort them. A label is the method, its backbone where the table has several, and every
    hyperparameter that differs among rows of the same method, setting and backbone. A row's group is its setting, and
    the number of shots where it differs in the table. A full label names the group too.
    """
    several = len({row.hyperparameters["backbone"] for row in rows}) > 1
    settings = {row.setting for row in rows}
    several_shots = len({row.shots for row in rows}) > 1
    alike: dict[tuple[str, str, str, bool], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.method, row.setting, row.hyperparameters["backbone"], row.configured), []).append(row)
    for (method, setting, backbone, configured), part in alike.items():
        keys = sorted({key for row in part for key in row.hyperparameters})
        differ = [key for key in keys if len({row.hyperparameters.get(key) for row in part}) > 1]
        named = sorted((short_key(key, differ), key) for key in differ)
        shown = {key: _shown({row.hyperparameters.get(key) for row in part}) for key in differ}
        name = f"{method} {_text(backbone)}" if several and backbone != "null" else method
        for row in part:
            details = [f"{short}={shown[key][row.hyperparameters.get(key)]}" for short, key in named]
            if not configured and (method, setting, backbone, True) in alike:
                details.append("configuration unknown")
            row.label = f"{name} ({', '.join(details)})" if details else name
            row.line = f"{row.label} [{setting}]" if len(settings) > 1 else row.label
            row.group = f"{setting}, {shots_text(row.shots)}" if several_shots else setting
            row.full_label = f"{row.label} [{row.group}]" if several_shots else row.line
    return sorted(rows, key=lambda row: (_natural(row.group), _natural(row.label)))


def _shown(values: set[str | None]) -> dict[str | None, str]:
    """Values of a key, stored as JSON, as a label shows them: texts without quotes unless two would look alike."""
    texts = {value: _text(value) for value in values}
    return texts if len({*texts.values()}) == len(texts) else {value: value or "–" for value in values}


def _text(value: str | None) -> str:
    """A value, stored as JSON; of transforms their names, of many texts the first ones."""
    content = None if value is None else json.loads(value)
    if isinstance(content, list) and content and all(isinstance(each, str) for each in content):
        return f"[{shorten(content)}]"
    if isinstance(content, list) and content and all(isinstance(each, dict) and "_target_" in each for each in content):
        return ", ".join(str(each["_target_"]).rpartition(".")[2] for each in content)
    return "–" if value is None else content if isinstance(content, str) else value


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key that orders numbers by their value: norm=3 before norm=10."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(pieces)]
