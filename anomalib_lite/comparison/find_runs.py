"""Finished runs found below folders, and which of them compare."""

import contextlib
import csv
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.cli.keys import flat
from anomalib_lite.errors import UserError
from anomalib_lite.runs.artifacts import read_result
from anomalib_lite.runs.folder import read_config as read_stored

PRUNED = {"checkpoints", "wandb", "figures", ".hydra", ".git", ".venv"}


@dataclass(eq=False)
class Run:
    """A finished run: its folder, result.json, and its configuration if it is still there."""

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]
    _scores: dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]] | None = field(default=None, repr=False)

    def value(self, category: str, metric: str) -> float | None:
        return self.result["per_category"].get(category, {}).get(metric)

    def cost(self, part: str, key: str, factor: float) -> float | None:
        """A number of `timing` or `efficiency`; of several (memory of host and devices) the largest."""
        value = (self.result.get(part) or {}).get(key)
        numbers = [v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, int | float)]
        return factor * float(max(numbers)) if numbers else None

    def scores(self, problems: list[str]) -> dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
        """Per category the test images' paths (sorted), labels and scores; empty, with a line in `problems`, where
        scores.csv can't be read.
        """
        if self._scores is None:
            try:
                self._scores = read_scores(self.folder / "scores.csv")
            except (OSError, ValueError) as error:
                self._scores = {}
                why = getattr(error, "strerror", None) or error
                problems.append(f"{self.folder / 'scores.csv'}: not readable, so no intervals from it ({why})")
        return self._scores

    def traits(self) -> dict[str, str]:
        """Everything but the seed that makes a run another experiment, as {key: JSON}."""
        from anomalib_lite.cli.schema import is_free  # here: --help needs no pydantic

        found = {
            key: value
            for key, value in flat(self.config).items()
            if not is_free(key, "compare")
            and key.rpartition(".")[2] not in ("seed", "_partial_", "_convert_", "_recursive_")
        }
        backbone = self.result.get("backbone") or {}
        found |= {"variant": self.result.get("variant"), "backbone": backbone.get("name")}
        found |= {"layers": backbone.get("layers"), "weights": self.result.get("weights")}
        found |= flat(self.result["protocol"].get("scoring"), "scoring")
        return {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in sorted(found.items())}


def read_scores(file: Path) -> dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
    """scores.csv by category; ValueError where it is damaged."""
    rows: dict[str, list[tuple[str, int, float]]] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        reader = csv.reader(opened)
        if next(reader, None) != ["path", "category", "defect", "label", "score"]:
            raise ValueError("not the columns path, category, defect, label, score")
        try:
            for path, category, _, label, score in reader:
                rows.setdefault(category, []).append((sys.intern(path), int(label), float(score)))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    found = {}
    for category, entries in rows.items():
        paths, labels, scores = zip(*sorted(entries), strict=True)
        if not set(labels) <= {0, 1} or not np.isfinite(scores).all():
            raise ValueError(f"{category}: a label that is not 0 or 1, or a score that is not finite")
        found[category] = (paths, np.array(labels), np.array(scores, np.float64))
    return found


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The folders that hold a result.json, each once, in order, and those of runs without; UserError for a folder that
    is not there."""
    found: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give folders with runs below them")
        for place, below, files in os.walk(folder):
            is_run = ".hydra" in below
            below[:] = sorted(name for name in below if name not in PRUNED)
            if "result.json" in files:
                found.setdefault(Path(place).resolve(), Path(place))
            elif is_run:
                unfinished.setdefault(Path(place).resolve(), Path(place))
    return list(found.values()), list(unfinished.values())


def read(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All runs below `folders`, and a line for each result.json that is damaged or not ours, and for runs without."""
    runs, left_out = [], []
    finished, unfinished = find(folders)
    for folder in finished:
        try:
            result = read_result(folder)
            wrong = fault(result)
            if wrong:
                raise UserError(f"{folder / 'result.json'}: damaged or not ours: {wrong}")
            runs.append(Run(folder, result, read_config(folder, result)))
        except UserError as error:
            left_out.append(str(error))
        except RecursionError:
            left_out.append(f"{folder / 'result.json'}: not readable as a result (nested too deeply)")
    if unfinished:
        left_out.append(f"{some([str(folder) for folder in unfinished])}: without a result (failed, or not ended yet)")
    return runs, left_out


def read_config(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration, or the one of the run that it evaluates again; empty where there is none."""
    notes = result.get("notes")
    again = [re.fullmatch(r"evaluated again from (.+)", str(n)) for n in (notes if isinstance(notes, list) else [])]
    for place in [folder, *(Path(match[1]) for match in again if match)]:
        with contextlib.suppress(UserError):
            return read_stored(place)[0]
    return {}


def fault(result: dict[str, Any]) -> str | None:
    """What of a result can't be compared, or None."""
    kinds = {"method": str, "dataset": str, "setting": str, "categories": list, "seed": int, "protocol": dict}
    for key, kind in (kinds | {"data": dict, "per_category": dict, "metrics": dict}).items():
        if not isinstance(result.get(key), kind):
            return f"{key} is missing, or no {kind.__name__}"
    if not isinstance(result["protocol"].get("data"), dict) or not isinstance(result["data"].get("fingerprint"), str):
        return "protocol.data or data.fingerprint is missing"
    for key in ("backbone", "timing", "efficiency", "split", "groups"):
        if not isinstance(result.get(key), dict | None):
            return f"{key} is no dict"
    for category in result["categories"]:
        metrics = result["per_category"].get(category) if isinstance(category, str) else None
        if not isinstance(metrics, dict) or not metrics:
            return f"per_category has no metrics of {category}"
        for key, value in metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                return f"per_category.{category}.{key} is {value}, not a number"
    if not result["categories"]:
        return "categories is empty"
    try:
        json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it holds text that is no Unicode"
    return None


def inner(value: Any, *keys: str) -> dict[str, Any]:
    """The dict at these keys; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of them, and how many more."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
