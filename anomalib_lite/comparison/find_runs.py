"""Finished runs found below folders, and what a comparison asks of a run."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from anomalib_lite.cli.keys import each_value, flat, lookup
from anomalib_lite.cli.values import read as read_value
from anomalib_lite.data.splits import SHOTS
from anomalib_lite.errors import UserError
from anomalib_lite.runs.artifacts import Scores, read_maps, read_result, read_scores
from anomalib_lite.runs.folder import (
    CHECKPOINTS,
    FIGURES,
    HYDRA,
    PLACES,
    RESULT,
    WANDB,
    is_run,
    read_config,
    stored_digests,
)

KINDS = {  # of what every result holds
    str: "method dataset setting data.fingerprint", int: "seed", list: "categories",
    dict: "protocol.data per_category metrics",
}  # fmt: skip
#: keys that `evaluate` changes and that make a run another experiment, beside those that its result repeats
EVALUATED = ("hardware.precision", "scoring.threshold_images")
#: keys that decide about the figures, though runs may differ in the other keys of their group
DECISIVE = (*EVALUATED, "cache.dtype")
SAME_EXPERIMENT = ("seed", "_partial_", "_convert_", "_recursive_")  # the last parts of keys that make no other one
NOT_SEARCHED = {CHECKPOINTS, WANDB, FIGURES, HYDRA, ".git", ".venv"}


@dataclass(eq=False)
class Run:
    """A finished run: its folder, result.json, its configuration (empty if the file is gone), and the comparison's list
    of warnings.
    """

    folder: Path
    result: dict[str, Any]
    config: dict[str, Any]
    problems: list[str] = field(repr=False)

    @property
    def shots(self) -> int | None:
        """The number of training images per category of a run with few shots; None for all images or another split."""
        split = dict_at(self.result, "split")
        shots = split.get("shots") if split.get("profile") == SHOTS else None
        return shots if isinstance(shots, int) else None

    @property
    def seeds(self) -> tuple[int, int]:
        """What is averaged over: the run's seed, and the seed with which few shots are drawn."""
        drawn = dict_at(self.result, "split").get("seed") if self.shots else 0
        return self.result["seed"], drawn if isinstance(drawn, int) else 0

    @property
    def fingerprint(self) -> str:
        """Of the images that the run has, or of all images of which its few shots are drawn."""
        data = self.result["data"]
        return str(data.get("full_fingerprint") or data["fingerprint"])

    def value(self, category: str, metric: str) -> float | None:
        return self.result["per_category"].get(category, {}).get(metric)

    def cost(self, part: str, key: str, factor: float) -> float | None:
        """A number of `timing` or `efficiency`; of several (memory of host and devices) the largest."""
        value = dict_at(self.result, part).get(key)
        numbers = [v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, int | float)]
        return factor * float(max(numbers)) if numbers else None

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The images' scores per category; empty, with a warning, where the file can't be read."""
        try:
            return read_scores(self.folder)
        except UserError as error:
            self.problems.append(f"{error}, so no intervals from it")
            return {}

    def maps(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Arrays of maps.npz; empty, with a warning, where the file can't be read."""
        try:
            return read_maps(self.folder, keys)
        except UserError as error:
            self.problems.append(f"{error}, so no curves and heat maps of it")
            return {}

    def hyperparameters(self) -> dict[str, str]:
        """Everything but the seed that makes a run another experiment, as {key: JSON}."""
        from anomalib_lite.cli.schema import defaults  # here: --help needs no pydantic

        known = defaults() | flat(self.config) if self.config else {}
        found = {
            key: value
            for key, value in known.items()
            if decides(key)
            and not (key.startswith("method.") and value is None)  # as without an option that the method got later
        }
        backbone, weights = dict_at(self.result, "backbone"), self.result.get("weights")
        digest = stored_digests(origin(self.folder, self.result)).get("backbone.weights")
        if weights and digest:  # a file: another one may have the same name
            weights = f"{weights} ({str(digest)[:8]})"
        found |= {"variant": self.result.get("variant"), "weights": weights}
        if self.result["setting"] == "unified":
            found["categories"] = sorted(self.result["categories"])
        found |= {
            key: backbone.get(name) for key, name in (("backbone", "name"), ("layers", "layers"), ("norm", "norm"))
        }
        found |= flat(self.result["protocol"].get("scoring"), "scoring")
        found["scoring.quantile"] = dict_at(self.result, "thresholds").get("quantile")
        return {key: to_json(value) for key, value in sorted(found.items())}


def decides(key: str) -> bool:
    """Whether a key of the configuration makes a run another experiment."""
    from anomalib_lite.cli.schema import is_free  # here: --help needs no pydantic

    return (key in DECISIVE or not is_free(key, "compare")) and key.rpartition(".")[2] not in SAME_EXPERIMENT


def to_json(value: Any) -> str:
    """JSON that is equal for equal values: 100.0 is written as 100."""
    same = each_value(value, lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
    return json.dumps(same, ensure_ascii=False, sort_keys=True)


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Path], list[str]]:
    """The folders of finished runs, each once, in order; those of runs without a result; and one line for each folder
    that can't be read. Links are followed.

    Raise UserError if one of `folders` does not exist.
    """
    finished, unfinished, unreadable, seen = list[Path](), list[Path](), list[str](), set[Path]()

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")

    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give folders with runs below them")
        for place, below, files in os.walk(folder, followlinks=True, onerror=note):
            if Path(place).resolve() in seen:
                below.clear()
                continue
            seen.add(Path(place).resolve())
            if RESULT in files:
                finished.append(Path(place))
            elif HYDRA in below:
                unfinished.append(Path(place))
            below[:] = sorted(name for name in below if name not in NOT_SEARCHED)
    return finished, unfinished, unreadable


def read(folders: Iterable[Path], problems: list[str]) -> tuple[list[Run], list[str]]:
    """All runs below `folders`, and one line for each result.json that is damaged or foreign, for unfinished runs, and
    for what can't be read.

    The runs add warnings on files that can't be read to `problems`, whenever they read one.
    """
    runs = []
    finished, unfinished, left_out = find(folders)
    for folder in finished:
        try:
            result = read_result(folder)
            if wrong := fault(result):
                raise UserError(f"{folder / RESULT}: damaged or not ours: {wrong}")
            runs.append(Run(folder, result, config_of(folder, result), problems))
        except UserError as error:
            left_out.append(str(error))
        except RecursionError:
            left_out.append(f"{folder / RESULT}: not readable as a result (nested too deeply)")
    if unfinished:
        left_out.append(f"{shorten(map(str, unfinished))}: without a result (failed, or not ended yet)")
    return runs, left_out


def origin(folder: Path, result: dict[str, Any]) -> Path:
    """The folder of the run's configuration: its own, or that of the run that it evaluates again."""
    found = [
        again[1] for note in _texts(result, "notes") if (again := re.fullmatch(r"evaluated again from (.+)", note))
    ]
    return Path(found[0]) if found and not is_run(folder) else folder


def config_of(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration, or the one of the run that it evaluates again; empty where there is none."""
    from hydra.errors import HydraException  # here: --help needs no Hydra

    place = origin(folder, result)
    with contextlib.suppress(UserError, yaml.YAMLError, HydraException):
        config = dict_at(read_config(place)[0])
        for override in _texts(result, "overrides") if place != folder else ():
            key, _, text = override.partition("=")
            # relative places, which earlier versions stored, lead nowhere from here
            is_path = key in PLACES and Path(text).is_absolute()
            is_other_place = key in PLACES and (text == "null" or text.startswith('["/'))
            if is_path or is_other_place or key in EVALUATED or key.startswith("scoring."):
                *groups, name = key.split(".")
                dict_at(config, *groups)[name] = text if is_path else read_value(override)
        return config
    return {}


def _texts(result: dict[str, Any], key: str) -> list[str]:
    value = result.get(key)
    return [str(each) for each in value] if isinstance(value, list) else []


def fault(result: dict[str, Any]) -> str | None:
    """Why a result can't be compared, or None if it can."""
    for kind, keys in KINDS.items():
        for key in keys.split():
            if not isinstance(lookup(result, key), kind):
                return f"{key} is missing, or no {kind.__name__}"
    for key in ("backbone", "timing", "efficiency", "split", "groups"):
        if not isinstance(result.get(key), dict | None):
            return f"{key} is no dict"
    if not result["categories"]:
        return "categories is empty"
    for category in result["categories"]:
        metrics = result["per_category"].get(category) if isinstance(category, str) else None
        if not isinstance(metrics, dict) or not metrics:
            return f"per_category has no metrics of {category}"
        for key, value in metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not number:
                return f"per_category.{category}.{key} is {value}, not a number"
    try:
        json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it holds text that is no Unicode"
    return None


def dict_at(value: Any, *keys: str) -> dict[str, Any]:
    """The dict at these nested keys; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def shorten(names: Iterable[str], most: int = 4) -> str:
    """The first of the distinct names, and how many more there are."""
    distinct: Sequence[str] = list(dict.fromkeys(names))
    return ", ".join(distinct[:most]) + (f" and {len(distinct) - most} more" if len(distinct) > most else "")
