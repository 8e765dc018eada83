"""Which runs share a table and which a row, and what the rows are called."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli.keys import flat
from anomalib_lite.comparison.cells import Row, Table
from anomalib_lite.comparison.find_runs import Run, inner, some

DEVELOPMENT = ("bottle", "toothbrush", "capsules", "magnetic_tile")  # the package's defaults were chosen on them


def tables(runs: Sequence[Run], problems: list[str]) -> list[Table]:
    """A table for each data set, split and protocol; lines on unreadable files go to `problems`."""
    parts: dict[str, list[tuple[dict[str, Any], Run]]] = {}
    prints: dict[str, list[str]] = {}
    for run in runs:
        result = run.result
        same = flat({"split": _split(result), "protocol": {"data": result["protocol"]["data"]}})
        data = json.dumps([result["dataset"], same, sorted(result["categories"])], sort_keys=True)
        known = prints.setdefault(data, [])
        if result["data"]["fingerprint"] not in known:
            known.append(result["data"]["fingerprint"])
        same["data.fingerprint"] = known.index(result["data"]["fingerprint"])
        parts.setdefault(json.dumps([result["dataset"], same], sort_keys=True), []).append((same, run))
    made: list[Table] = []
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, entries in enumerate(parts.values(), 1):
        same, members = entries[0][0], [run for _, run in entries]
        result = members[0].result
        split = _split(result)["profile"]
        title = f"{result['dataset']}, split {_called(result)}" if split != "full" else str(result["dataset"])
        notes = []
        if result["dataset"] in first:
            other, theirs = first[result["dataset"]]
            where = some([str(run.folder) for run in members])
            for key in sorted(same.keys() | theirs.keys()):
                if same.get(key) != theirs.get(key):
                    is_hash = key == "data.fingerprint"
                    what = "" if is_hash else f" ({json.dumps(same.get(key))}, there {json.dumps(theirs.get(key))})"
                    notes.append(f"does not compare with table {other}: {key} differs{what}; here: {where}")
        first.setdefault(result["dataset"], (number, same))
        made.append(_table(title, members, notes, problems))
    return made


def _split(result: dict[str, Any]) -> dict[str, Any]:
    """What makes a split another one. Its files are in the fingerprint, and its name may be one of several."""
    split = result.get("split") or {}
    profile = split.get("profile", split.get("name", "full"))
    told = ("name", "profile", "path", "format", "tail", "counts", "full_counts")
    return {"profile": profile} | {k: v for k, v in split.items() if k not in told and profile != "full"}


def _called(result: dict[str, Any]) -> str:
    """exp20 (order reverse, seed 1)."""
    split = result["split"]
    if "imbalance" not in split:
        path = split.get("path")
        return f"{split.get('name')}" + (f" {'/'.join(Path(path).parts[-3:])}" if isinstance(path, str) else "")
    order = split.get("order")
    apart = [f"order {', '.join(order) if isinstance(order, list) else order}"] * (order != "size")
    apart += [f"split.seed {split.get('seed')}"] * (split.get("seed", 0) != 0)
    return f"{split.get('profile')}{split['imbalance']}" + f" ({'; '.join(apart)})" * bool(apart)


def _table(title: str, runs: list[Run], notes: list[str], problems: list[str]) -> Table:
    rows: dict[str, Row] = {}
    repeated = []
    for run in sorted(runs, key=lambda r: str((r.result.get("timing") or {}).get("date", ""))):
        traits = run.traits()
        key = json.dumps([run.result["method"], run.result["setting"], traits], sort_keys=True)
        row = rows.setdefault(key, Row(run.result["method"], run.result["setting"], traits))
        for category in run.result["categories"]:
            seeds = row.runs.setdefault(category, {})
            if run.result["seed"] in seeds:
                repeated.append(str(seeds[run.result["seed"]].folder))
            seeds[run.result["seed"]] = run
    categories = sorted({category for row in rows.values() for category in row.runs}, key=_natural)
    ordered = label(list(rows.values()))
    if repeated:
        notes.append(f"run again with the same seed, the newest counts; left out: {some(repeated)}")
    for category in categories:
        having = [run.result["data"] for run in runs if category in run.result["categories"]]
        counts = {json.dumps(inner(data, "test_counts").get(category)) for data in having}
        if len(counts) > 1:
            notes.append(f"{category}: not the same test images in all runs ({some(sorted(counts))})")
    scoring: dict[str, dict[str, list[str]]] = {}
    for row in ordered:
        for key, value in row.traits.items():
            if key.startswith("scoring"):
                scoring.setdefault(key, {}).setdefault(value, []).append(row.label)
    for key, values in scoring.items():
        if len(values) > 1:
            told = "; ".join(f"{value}: {some(labels)}" for value, labels in values.items())
            notes.append(f"protocol.{key} differs ({told})")
    developed = [category for category in categories if category in DEVELOPMENT]
    if developed:
        notes.append(f"development data: {', '.join(developed)} (defaults were chosen on them)")
    return Table(title, ordered, categories, notes, problems)


def label(rows: list[Row]) -> list[Row]:
    """Name the rows, and sort them: the method, its backbone where the table has several, and whatever else differs
    among rows of the same method, setting and backbone.
    """
    several = len({row.traits["backbone"] for row in rows}) > 1
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.method, row.setting, row.traits["backbone"]), []).append(row)
    for like in alike.values():
        whole = [row for row in like if len(row.traits) > _bare(row)] or like
        for part in (whole, [row for row in like if row not in whole]):  # the latter: runs whose configuration is gone
            keys = sorted({key for row in part for key in row.traits})
            differ = [key for key in keys if len({row.traits.get(key) for row in part}) > 1]
            named = sorted((shorten(key, differ), key) for key in differ)
            for row in part:
                told = [f"{name}={_shown(row.traits.get(key))}" for name, key in named]
                told += ["configuration unknown"] * (part is not whole)
                with_backbone = several and row.traits["backbone"] != "null"
                row.label = row.method + (f" {_shown(row.traits['backbone'])}" if with_backbone else "")
                row.label += f" ({', '.join(told)})" if told else ""
    return sorted(rows, key=lambda row: (row.setting, _natural(row.label)))


def _bare(row: Row) -> int:
    """How many of its traits result.json alone tells."""
    own = ("variant", "backbone", "layers", "weights")
    return len([key for key in row.traits if key in own or key.startswith("scoring")])


def shorten(key: str, among: Sequence[str]) -> str:
    """`method.norm` as `norm`, unless another of these keys ends so too."""
    key = key.removesuffix("._target_")
    last = key.rpartition(".")[2]
    alike = [other for other in among if other.removesuffix("._target_").rpartition(".")[2] == last]
    return last if len(alike) == 1 else key


def _shown(value: str | None) -> str:
    if value is None:
        return "–"
    text = json.loads(value)
    return text if isinstance(text, str) else value


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Numbers by their value: norm=3 before norm=10."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(pieces)]
