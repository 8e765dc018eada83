"""The reproduction board: published figures beside ours, with the difference and what differs in the setting."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from anomalib_lite.cli.keys import flat
from anomalib_lite.comparison.find_runs import Run, dict_at, shorten
from anomalib_lite.comparison.tables import Row, Table, shots_text
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
    config: dict[str, Any] = Field(default_factory=dict)  # keys of a run's configuration, as published
    experiment: str | None = None  # +experiments=NAME runs it
    overrides: list[str] = Field(default_factory=list)  # further arguments of that command
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
    """A line for each published figure and each row of runs with its method, data set, setting and split."""
    lines = []
    for entry in entries:
        rows = [(table, row) for table in tables for row in table.rows if _belongs(row, table, entry)]
        for metric, value in entry.values.items():
            lines += [_line(entry, metric, value, row) for _, row in rows] or [_not_run(entry, metric, value)]
    return lines


def _belongs(row: Row, table: Table, entry: Published) -> bool:
    result = row.all_runs()[0].result
    same = (row.method, row.setting, result["dataset"], _split_of(result))
    return (*same, row.shots) == (entry.method, entry.setting, entry.dataset, entry.split, entry.shots)


def _split_of(result: dict[str, Any]) -> str:
    """A run's split as `Published.split` names it: exp100 also of split=exp split.imbalance=100."""
    split = dict_at(result, "split")
    profile, imbalance = split.get("profile"), split.get("imbalance")
    known = profile and profile != "full" and isinstance(imbalance, int | float)
    return f"{profile}{imbalance:g}" if known else str(profile or split.get("name", "full"))


def _not_run(entry: Published, metric: str, value: float) -> Line:
    command = f"+experiments={entry.experiment}" if entry.experiment else "no experiment"
    return Line(entry, metric, value, remarks=[" ".join([command, *entry.overrides])])


def _line(entry: Published, metric: str, value: float, row: Row) -> Line:
    values = {category: found for category in row.runs if (found := row.values(category, metric))}
    line = Line(entry, metric, value)
    known = entry.per_category.get(metric, {})
    if len(values) != entry.categories:
        line.remarks.append(f"{len(values)} of {entry.categories} categories ({shorten(values)})")
        whole = bool(values) and values.keys() <= known.keys()
        line.published = float(np.mean([known[category] for category in values])) if whole else None
    line.remarks += _other_settings(entry, row.all_runs()[0])
    if values:
        seeds = sorted(set.intersection(*(set(of) for of in values.values())))
        means = [100 * float(np.mean([of[seed] for of in values.values()])) for seed in seeds]
        each = [list(of.values()) for of in values.values()]
        line.ours = float(np.mean(means or [100 * float(np.mean(of)) for of in each]))
        line.seeds = len(means) or min(map(len, each))
        line.sd = float(np.std(means, ddof=1)) if len(means) > 1 else None
    line.differs = bool(line.remarks)
    line.remarks.append(_where(row))
    return line


def _other_settings(entry: Published, run: Run) -> Iterator[str]:
    """What the run's configuration has other than the published one."""
    config = flat(run.config)
    wanted = flat(entry.config)
    if not config and wanted:
        yield "the run's configuration is unknown"
        return
    for key, published in wanted.items():
        if config.get(key) != published:
            yield f"{key}={config.get(key)}, published {published}"


def _where(row: Row) -> str:
    """On which device and commit the runs were made."""
    places = []
    for run in row.all_runs():
        about = dict_at(run.result, "environment")
        commit = str(about.get("git") or "unknown")
        places.append(f"{about.get('device', 'unknown device')}, commit {commit[:8]}{commit[40:]}")  # +changes
    return shorten(places, 2)
