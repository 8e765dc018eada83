"""A table of methods and categories: its cells with intervals, its paired tests and its costs."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from anomalib_lite.comparison import statistics
from anomalib_lite.comparison.find_runs import Run, dict_at, shorten

FEWEST_CATEGORIES = 6  # for a paired test
LARGE = 3000, 500_000  # runs times categories, and their test images
#: heading: part of result.json, key, factor
COSTS: dict[str, tuple[str, str, float]] = {
    "fit (s)": ("timing", "fit_s", 1),
    "test (s)": ("timing", "test_s", 1),
    "latency (ms)": ("timing", "latency_ms", 1),
    "images/s": ("timing", "images_per_s", 1),
    "memory (GiB)": ("timing", "peak_memory_mb", 1 / 1024),
    "parameters (M)": ("efficiency", "parameters", 1e-6),
    "trained (M)": ("efficiency", "trainable", 1e-6),
    "GFLOP/image": ("efficiency", "flops_per_image", 1e-9),
}


class Over(Enum):
    """Columns of means over categories: all of them, or those of a long tail's head or tail."""

    HEAD = "head"
    TAIL = "tail"
    MEAN = "mean"


Column = str | Over
Seeds = tuple[int, int]  # of the run, and of the draw of few shots


def shots_text(shots: int | None) -> str:
    return "all images" if shots is None else f"{shots} shot{'s' * (shots > 1)}"


def ordered_shots(shots: Iterable[int | None]) -> list[int | None]:
    """The distinct numbers of shots, all images (None) last."""
    return sorted(set(shots), key=lambda number: (number is None, number or 0))


@dataclass
class Cell:
    """A metric's mean and standard deviation over seeds, with the bootstrap interval over test images; fractions."""

    mean: float
    sd: float | None
    seeds: int
    interval: tuple[float, float] | None = None
    best: bool = False


class PairedTest(NamedTuple):
    """Wilcoxon's test of two rows over their common categories: the labels, the mean of a - b, and the corrected p."""

    a: str
    b: str
    difference: float
    p: float
    categories: int


@dataclass(eq=False)
class Row:
    """Runs that differ in nothing but seed, category, and with few shots the draw of the images."""

    method: str
    setting: str
    hyperparameters: dict[str, str]
    configured: bool  # whether their configuration is still on disk
    shots: int | None = None  # training images per category; None: not few shots
    group: str = ""  # its heading: setting, and number of shots where it differs
    label: str = ""  # within its group
    line: str = ""  # within the table, but the same for all numbers of shots
    full_label: str = ""  # within the table
    runs: dict[str, dict[Seeds, Run]] = field(default_factory=dict)  # category, seeds

    def all_runs(self) -> list[Run]:
        return list(dict.fromkeys(run for seeds in self.runs.values() for run in seeds.values()))

    def first_run(self, category: str) -> Run | None:
        """The run with the smallest seed: it stands for the row in curves and heat maps."""
        return min(self.runs.get(category, {}).items(), default=((0, 0), None), key=lambda of: of[0])[1]

    def values(self, category: str, metric: str) -> dict[Seeds, float]:
        """The metric by seeds, without nulls."""
        found = {seed: run.value(category, metric) for seed, run in sorted(self.runs.get(category, {}).items())}
        return {seed: value for seed, value in found.items() if value is not None}


Body = dict[str, dict[Row, dict[Column, Cell]]]


@dataclass(eq=False)
class Table:
    """Rows that compare: the same data, split and protocol. A computed body and its tests are kept with the table."""

    title: str
    dataset: str
    rows: list[Row]
    categories: list[str]
    notes: list[str]
    _resamples: dict[tuple[str, bytes], np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.all_runs()]

    @cached_property
    def metrics(self) -> list[str]:
        parts = (part for run in self.runs for part in run.result["per_category"].values())
        return list(dict.fromkeys(key for part in parts for key in part))

    @cached_property
    def columns(self) -> dict[Column, list[str]]:
        """The categories of each column: every category itself, then the means over several."""
        columns: dict[Column, list[str]] = {category: [category] for category in self.categories}
        if len(self.categories) > 1:
            splits = (run.result.get("split") or {} for run in self.runs)
            split: dict[str, Any] = next((s for s in splits if isinstance(s.get("head"), list)), {})
            means = {Over.HEAD: split.get("head"), Over.TAIL: split.get("tail"), Over.MEAN: self.categories}
            columns |= {over: names for over, names in means.items() if names and set(names) <= set(self.categories)}
        return columns

    @cached_property
    def large(self) -> bool:
        """Whether bootstrapping AP and F1-max of so many runs, categories and test images would take minutes."""
        counts = [
            sum(dict_at(run.result, "data", "test_counts", category).values())
            for row in self.rows
            for category, seeds in row.runs.items()
            for run in seeds.values()
        ]
        return len(counts) > LARGE[0] or sum(counts) > LARGE[1]

    @cache  # noqa: B019  a table lives as long as the program
    def body(self, metric: str) -> Body:
        """All cells by group (single first, few shots first) and row; the best of a column, and those that round to the
        same, are marked, unless all of them do.
        """
        body: Body = {}
        for row in self.rows:
            body.setdefault(row.group, {})[row] = self._cells(row, metric)
        for rows in body.values():
            for column in self.columns:
                cells = [of[column] for of in rows.values() if column in of]
                shown = [round(100 * cell.mean, 1) for cell in cells]
                for cell, value in zip(cells, shown, strict=True):
                    cell.best = value == max(shown) and (min(shown) < value or len(shown) < len(rows))
        return body

    def cells(self, row: Row, metric: str) -> dict[Column, Cell]:
        """The row's cells by column; a mean is there if the row has all its categories."""
        return self.body(metric)[row.group][row]

    @cached_property
    def shots(self) -> list[int | None]:
        """The numbers of shots, all images (None) last; empty where all rows have the same."""
        found = ordered_shots(row.shots for row in self.rows)
        return found if len(found) > 1 else []

    def over_shots(self, metric: str) -> dict[str, dict[int | None, Cell]]:
        """The cells of the last column (the mean over categories, or the only one) per method and number of shots."""
        lines: dict[str, dict[int | None, Cell]] = {}
        for row in self.rows:
            if cell := self.cells(row, metric).get(list(self.columns)[-1]):
                lines.setdefault(row.line, {})[row.shots] = cell
        return dict(sorted(lines.items()))

    def means(self, row: Row, metric: str) -> dict[str, float]:
        """The mean over seeds per category."""
        cells = self.cells(row, metric)
        return {category: cells[category].mean for category in self.categories if category in cells}

    def _cells(self, row: Row, metric: str) -> dict[Column, Cell]:
        by_seed = {category: row.values(category, metric) for category in self.categories}
        draws = {category: self.draws(row, category, metric) for category, values in by_seed.items() if values}
        return {
            column: cell_of([by_seed[name] for name in names], [draws[name] for name in names])
            for column, names in self.columns.items()
            if all(by_seed[name] for name in names)
        }

    def draws(self, row: Row, category: str, metric: str) -> np.ndarray | None:
        """The metric's bootstrap draws over the category's test images, with the same resamples for every method.

        None where the metric has none, or scores.csv is missing or belongs to other images or another result.
        """
        if metric not in statistics.DRAWS or (self.large and metric != "image_auroc"):
            return None
        runs = [run for run in row.runs[category].values() if run.value(category, metric) is not None]
        seeds = [run.scores[category] for run in runs if category in run.scores]
        if len(seeds) < len(runs) or any(
            one.paths != seeds[0].paths or (one.labels != seeds[0].labels).any() for one in seeds
        ):
            return None
        labels, scores = seeds[0].labels, np.array([one.scores for one in seeds])
        if labels.all() or not labels.any():
            return None
        of_test_set = float(statistics.DRAWS[metric](np.ones((1, len(labels))), labels, scores)[0])
        if abs(of_test_set - float(np.mean(list(row.values(category, metric).values())))) > 1e-3:
            folders = shorten(str(run.folder) for run in runs)
            runs[0].problems.append(f"scores.csv in {folders} gives another {metric} than result.json, so no interval")
            return None
        key = category, labels.tobytes()
        if key not in self._resamples:
            self._resamples[key] = statistics.resamples(labels, seed=[0, zlib.crc32(category.encode())])
        return statistics.DRAWS[metric](self._resamples[key], labels, scores)

    @cache  # noqa: B019  a table lives as long as the program
    def tests(self, metric: str) -> list[PairedTest]:
        """Wilcoxon tests over categories of all pairs in a group, the smallest p first, corrected by Holm."""
        found, means = [], {row: self.means(row, metric) for row in self.rows}
        for rows in self.body(metric).values():
            for a, b in combinations(rows, 2):
                of_a, of_b = means[a], means[b]
                both = [category for category in of_a if category in of_b]
                if len(both) >= FEWEST_CATEGORIES:
                    x, y = [of_a[c] for c in both], [of_b[c] for c in both]
                    difference, p = float(np.mean(np.subtract(x, y))), statistics.wilcoxon(x, y)
                    found.append(PairedTest(a.full_label, b.full_label, difference, p, len(both)))
        corrected = statistics.holm([test.p for test in found])
        tests = [test._replace(p=float(p)) for test, p in zip(found, corrected, strict=True)]
        return sorted(tests, key=lambda test: test.p)

    def costs(self) -> dict[Row, dict[str, float | None]]:
        """The means over runs of what `COSTS` names, per row."""
        return {
            row: {name: _mean(run.cost(*where) for run in row.all_runs()) for name, where in COSTS.items()}
            for row in self.rows
        }


def cell_of(by_seed: Sequence[dict[Seeds, float]], draws: Sequence[np.ndarray | None]) -> Cell:
    """The mean over categories and seeds; the deviation is that of the seeds' means."""
    mean = float(np.mean([np.mean(list(values.values())) for values in by_seed]))
    same = all(values.keys() == by_seed[0].keys() for values in by_seed)
    means = [np.mean([values[seed] for values in by_seed]) for seed in by_seed[0]] if same else []
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else None
    known = [drawn for drawn in draws if drawn is not None]
    interval = statistics.interval(np.mean(known, axis=0)) if len(known) == len(draws) else None
    return Cell(mean, sd, min(len(values) for values in by_seed), interval)


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
