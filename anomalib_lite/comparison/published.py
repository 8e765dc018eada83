"""The reproduction board: published figures beside ours, with the difference and what differs in the setting."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from anomalib_lite.cli.keys import flat
from anomalib_lite.cli.program import composed
from anomalib_lite.comparison.find_runs import SAME_EXPERIMENT, Run, decides, dict_at, shorten
from anomalib_lite.comparison.tables import Row, Table, cell_of, shots_text
from anomalib_lite.errors import UserError
from anomalib_lite.metrics.names import name_of

HEADINGS = (
    "method", "data set", "setting", "metric", "published", "ours", "difference", "what differs, and where ours ran",
    "the published figure",
)  # fmt: skip


class Published(BaseModel):
    """One published setting: the content of an entry of published.yaml. Figures are in percent."""

    model_config = ConfigDict(extra="forbid")

    method: str
    dataset: str  # `data.name` of the runs
    setting: str = "single"  # or "unified"
    split: str = "full"  # shots, file, or a long tail with its imbalance, such as exp100
    shots: int | None = None  # training images per category, with split: shots
    categories: int = Field(gt=0)  # over which the figures are means
    values: dict[str, float]  # by metric
    per_category: dict[str, dict[str, float]] = Field(default_factory=dict)  # by metric and category
    experiment: str | None = None  # +experiments=NAME has the published settings
    overrides: list[str] = Field(default_factory=list)  # further arguments of that command
    config: dict[str, Any] = Field(default_factory=dict)  # published settings that no experiment has, as keys of a run
    source: str
    test_informed: str | None = None  # what the published figure took from test images
    differences: str | None = None  # between the published protocol and ours


@dataclass
class Line:
    """A line of the board: a published figure and a row of runs, or none."""

    entry: Published
    metric: str
    published: float | None
    ours: float | None = None
    sd: float | None = None
    seeds: int = 0
    differs: bool = False  # whether ours has fewer categories or another setting
    remarks: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """A cell for each of `HEADINGS`."""
        entry = self.entry
        place = entry.setting if entry.split == "full" else f"{entry.setting}, {entry.split}"
        place = place if entry.shots is None else f"{entry.setting}, {shots_text(entry.shots)}"
        deviation = f" ± {self.sd:.1f}" if self.sd is not None else ""
        ours = "not run" if self.ours is None else f"{self.ours:.1f}{deviation} ({self.seeds})"
        known = self.ours is not None and self.published is not None
        difference = f"{self.ours - self.published:+.1f}" if known else "–"  # type: ignore[operator]
        about = [entry.source]
        about += [f"test-informed: {entry.test_informed}"] * bool(entry.test_informed)
        about += [f"protocol: {entry.differences}"] * bool(entry.differences)
        published = "–" if self.published is None else f"{self.published:.1f}"
        remarks = "; ".join(self.remarks)
        return [
            entry.method, entry.dataset, place, name_of(self.metric), published, ours, difference, remarks,
            "; ".join(about),
        ]  # fmt: skip


def read(file: Path) -> list[Published]:
    """The entries of a file such as experiments/published.yaml.

    Raises:
        UserError: the file can't be read, or an entry has an unknown or a wrong field.
    """
    try:
        entries = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}; give a file such as published.yaml") from error
    entries = entries.get("published") if isinstance(entries, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{file}: the key `published` is no list of settings; see experiments/published.yaml")
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(Published.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{file}: entry {number}, {where}: {first['msg']}; correct this field") from error
    return found


def board(entries: Sequence[Published], tables: Sequence[Table]) -> list[Line]:
    """A line for each published figure and each row of runs with its method, data set, setting and split.

    Raises:
        UserError: an entry's experiment can't be composed.
    """
    lines = []
    for entry in entries:
        rows = _joined(row for table in tables for row in table.rows if _belongs(row, entry))
        study = _settings_of(entry) if rows else {}
        for metric, value in entry.values.items():
            lines += [_line(entry, metric, value, row, study) for row in rows] or [_not_run(entry, metric, value)]
    return lines


def _belongs(row: Row, entry: Published) -> bool:
    result = row.all_runs()[0].result
    same = (row.method, row.setting, result["dataset"], _split_of(result))
    return (*same, row.shots) == (entry.method, entry.setting, entry.dataset, entry.split, entry.shots)


def _joined(rows: Iterable[Row]) -> list[Row]:
    """Rows of several tables that differ in their categories alone, as one: textures have maps of other sizes."""
    joined: list[Row] = []
    for row in rows:
        same = [each for each in joined if each.hyperparameters == row.hyperparameters]
        other = next((each for each in same if not each.runs.keys() & row.runs.keys()), None)
        if other is None:
            joined.append(replace(row, runs=dict(row.runs)))
        else:
            other.runs |= row.runs
    return joined


def _settings_of(entry: Published) -> dict[str, Any]:
    """The published settings by key: those of the entry's experiment, and over them what the entry names."""
    if entry.experiment is None:
        return flat(entry.config)
    from hydra.errors import HydraException

    command = [f"+experiments={entry.experiment}", *entry.overrides]
    try:
        return _decisive(composed([*command, "data.category=all"])[0]) | flat(entry.config)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--published: {' '.join(command)} of {entry.method}: {reason}; correct the entry") from error


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that decide about a run's figures, but for the seed."""
    from anomalib_lite.cli.schema import defaults  # here: --help needs no pydantic

    repeated = ("backbone.", "scoring.", "split.")  # in results, so that `decides` leaves them to these
    return {
        key: value
        for key, value in (defaults() | flat(config)).items()
        if decides(key) or (key.startswith(repeated) and key.rpartition(".")[2] not in SAME_EXPERIMENT)
    }


def _split_of(result: dict[str, Any]) -> str:
    """A run's split as `Published.split` names it: exp100 also of split=exp split.imbalance=100."""
    split = dict_at(result, "split")
    profile, imbalance = split.get("profile"), split.get("imbalance")
    known = profile and profile != "full" and isinstance(imbalance, int | float)
    return f"{profile}{imbalance:g}" if known else str(profile or split.get("name", "full"))


def _not_run(entry: Published, metric: str, value: float) -> Line:
    command = f"+experiments={entry.experiment}" if entry.experiment else "no experiment"
    return Line(entry, metric, value, remarks=[" ".join([command, *entry.overrides])])


def _line(entry: Published, metric: str, value: float, row: Row, study: dict[str, Any]) -> Line:
    values = {category: found for category in row.runs if (found := row.values(category, metric))}
    line = Line(entry, metric, value)
    known = entry.per_category.get(metric, {})
    if len(values) != entry.categories:
        line.remarks.append(f"{len(values)} of {entry.categories} categories ({shorten(values)})")
        whole = bool(values) and values.keys() <= known.keys()
        line.published = float(np.mean([known[category] for category in values])) if whole else None
    first = dict.fromkeys(run for category in row.runs if (run := row.first_run(category)))  # of each joined table
    other_settings = (text for run in first for text in _other_settings(entry, run, study))
    for differences in _other_images(entry, row), other_settings:
        if text := shorten(differences, 8):
            line.remarks.append(text)
    if values:
        cell = cell_of(list(values.values()), [None])
        line.ours, line.sd, line.seeds = 100 * cell.mean, cell.sd and 100 * cell.sd, cell.seeds
    line.differs = bool(line.remarks)
    line.remarks.append(_where(row))
    return line


def _other_images(entry: Published, row: Row) -> Iterator[str]:
    """The categories whose images are not the official ones, by their numbers for training and of the test set."""
    from anomalib_lite.data.readers import COUNTS  # here: --help needs no image library

    for category, official in COUNTS.get(entry.dataset, {}).items():
        if run := row.first_run(category):
            test = dict_at(run.result, "data", "test_counts", category)
            train = dict_at(run.result, "split", "full_counts").get(category, official[0])
            counts = train, test.get("good", 0), test.get("defective", 0)
            if counts != official:
                ours, theirs = (" + ".join(map(str, numbers)) for numbers in (counts, official))
                yield f"{category} has {ours} images, officially {theirs}"


def _other_settings(entry: Published, run: Run, study: dict[str, Any]) -> Iterator[str]:
    """Where the run's settings are not the published ones; without an experiment, only some of them are known."""
    if not run.config and study:
        yield "the run's configuration is unknown"
        return
    given = _decisive(run.config)
    for key in dict.fromkeys((*study, *(given if entry.experiment else ()))):
        if given.get(key) != study.get(key):
            yield f"{key}={given.get(key)}, published {study.get(key)}"


def _where(row: Row) -> str:
    """On which device and commit the runs were made."""
    places = []
    for run in row.all_runs():
        about = dict_at(run.result, "environment")
        commit = str(about.get("git") or "unknown")
        places.append(f"{about.get('device', 'unknown device')}, commit {commit[:8]}{commit[40:]}")  # +changes
    return shorten(places, 2)
