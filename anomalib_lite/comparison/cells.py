"""A table of methods and categories from runs that compare: its cells, tests, groups and costs."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from anomalib_lite.comparison import statistics
from anomalib_lite.comparison.find_runs import Run, some

FEWEST_CATEGORIES = 6  # for a paired test
LARGE = 3000  # runs times categories


class Over(Enum):
    """Columns of means over categories: all of them, or those of a long tail's head or tail."""

    MEAN = "mean"
    HEAD = "head"
    TAIL = "tail"


Column = str | Over


@dataclass
class Cell:
    """A metric over seeds, with its bootstrap interval over test images; fractions."""

    mean: float
    sd: float | None
    seeds: int
    interval: tuple[float, float] | None = None
    best: bool = False


@dataclass(eq=False)
class Row:
    """Runs that differ in nothing but seed and category."""

    method: str
    setting: str
    traits: dict[str, str]
    label: str = ""
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)  # category, seed

    def all_runs(self) -> list[Run]:
        return list({id(run): run for seeds in self.runs.values() for run in seeds.values()}.values())

    def values(self, category: str, metric: str) -> dict[int, float]:
        """By seed, those that are not null."""
        found = {seed: run.value(category, metric) for seed, run in sorted(self.runs.get(category, {}).items())}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass
class Table:
    """Rows that compare: the same data, split and protocol."""

    title: str
    rows: list[Row]
    categories: list[str]
    notes: list[str]
    problems: list[str]
    _drawn: dict[Any, np.ndarray] = field(default_factory=dict)
    _cells: dict[tuple[int, str], dict[Column, Cell]] = field(default_factory=dict)
    _tests: dict[str, tuple[list[tuple[str, str, float, float, int]], str]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        runs = (run for row in self.rows for run in row.all_runs())
        return list(dict.fromkeys(key for run in runs for part in run.result["per_category"].values() for key in part))

    @property
    def settings(self) -> dict[str, list[Row]]:
        """The rows of each setting: single first."""
        return {name: [r for r in self.rows if r.setting == name] for name in sorted({r.setting for r in self.rows})}

    @cached_property
    def members(self) -> dict[Over, list[str]]:
        """The categories of each mean that the table has."""
        if len(self.categories) < 2:
            return {}
        splits = [run.result.get("split") for row in self.rows for run in row.all_runs()]
        split: Any = next((s for s in splits if isinstance(s, dict) and isinstance(s.get("head"), list)), {})
        parts = {Over.HEAD: split.get("head"), Over.TAIL: split.get("tail"), Over.MEAN: self.categories}
        return {over: names for over, names in parts.items() if names and set(names) <= set(self.categories)}

    @property
    def columns(self) -> list[Column]:
        return [*self.categories, *self.members]

    @property
    def large(self) -> bool:
        """So many runs and categories that bootstrapping AP and F1-max would take minutes."""
        return sum(len(seeds) for row in self.rows for seeds in row.runs.values()) > LARGE

    def cells(self, row: Row, metric: str) -> dict[Column, Cell]:
        """The row's cells by category, and the means of which it has all categories."""
        if (id(row), metric) not in self._cells:
            self._cells[id(row), metric] = self._computed(row, metric)
        return self._cells[id(row), metric]

    def _computed(self, row: Row, metric: str) -> dict[Column, Cell]:
        by_seed = {category: row.values(category, metric) for category in self.categories}
        by_seed = {category: values for category, values in by_seed.items() if values}
        draws = {category: self.draws(row, category, metric) for category in by_seed}
        cells: dict[Column, Cell] = {}
        for category in by_seed:
            cells[category] = _mean_cell([by_seed[category]], [draws[category]])
        for over, names in self.members.items():
            if all(name in by_seed for name in names):
                cells[over] = _mean_cell([by_seed[name] for name in names], [draws[name] for name in names])
        return cells

    def draws(self, row: Row, category: str, metric: str) -> np.ndarray | None:
        """The metric's bootstrap draws over the category's test images; the same resamples for every method."""
        if metric not in statistics.DRAWS or (self.large and metric != "image_auroc"):
            return None
        used = [run for run in row.runs[category].values() if run.value(category, metric) is not None]
        seeds = [found for run in used if (found := run.scores(self.problems).get(category))]
        if len(seeds) < len(used) or any(one[0] != seeds[0][0] or (one[1] != seeds[0][1]).any() for one in seeds):
            return None
        labels = seeds[0][1]
        if labels.all() or not labels.any():
            return None
        key = category, labels.tobytes()
        if key not in self._drawn:
            self._drawn[key] = statistics.resamples(labels, seed=[0, zlib.crc32(category.encode())])
        scores = np.array([one[2] for one in seeds])
        whole = float(statistics.DRAWS[metric](np.ones((1, len(labels))), labels, scores)[0])
        if abs(whole - float(np.mean(list(row.values(category, metric).values())))) > 1e-3:
            folders = some([str(run.folder) for run in used])
            self.problems.append(f"scores.csv in {folders} gives another {metric} than result.json, so no interval")
            return None
        return statistics.DRAWS[metric](self._drawn[key], labels, scores)

    def body(self, metric: str, digits: int = 1) -> dict[str, list[tuple[Row, dict[Column, Cell]]]]:
        """All cells by setting; the best of a column, and what equals it when rounded, is marked."""
        body = {name: [(row, self.cells(row, metric)) for row in rows] for name, rows in self.settings.items()}
        for rows in body.values():
            for column in self.columns:
                there = [cells[column] for _, cells in rows if column in cells]
                top = max((round(100 * cell.mean, digits) for cell in there), default=None)
                for cell in there:
                    cell.best = len(rows) > 1 and round(100 * cell.mean, digits) == top
        return body

    def means(self, row: Row, metric: str) -> dict[str, float]:
        """Per category the mean over seeds."""
        values = {category: row.values(category, metric) for category in self.categories}
        return {category: float(np.mean(list(of.values()))) for category, of in values.items() if of}

    def missing(self, metric: str) -> list[str]:
        """Why some rows have no mean over categories."""
        lines: dict[str, list[str]] = {}
        for row in self.rows:
            absent = [category for category in self.categories if not row.values(category, metric)]
            if absent:
                lines.setdefault(some(absent), []).append(row.label)
        more = ", so no mean" if len(self.categories) > 1 else ""
        return [f"without {metric} of {absent}{more}: {some(labels)}" for absent, labels in lines.items()]

    def tests(self, metric: str) -> tuple[list[tuple[str, str, float, float, int]], str]:
        """Wilcoxon tests over categories of all pairs in a setting: (a, b, mean difference, corrected p, categories);
        and a line that says what was tested, or why nothing was.
        """
        if metric not in self._tests:
            self._tests[metric] = self._tested(metric)
        return self._tests[metric]

    def _tested(self, metric: str) -> tuple[list[tuple[str, str, float, float, int]], str]:
        found = []
        for rows in self.settings.values():
            means = [(row.label, self.means(row, metric)) for row in rows]
            for (a, of_a), (b, of_b) in combinations(means, 2):
                both = [c for c in of_a if c in of_b]
                if len(both) >= FEWEST_CATEGORIES:
                    x, y = [of_a[c] for c in both], [of_b[c] for c in both]
                    found.append((a, b, float(np.mean(np.subtract(x, y))), statistics.wilcoxon(x, y), len(both)))
        if not found:
            lone = all(len(rows) < 2 for rows in self.settings.values())
            why = "one method alone" if lone else f"fewer than {FEWEST_CATEGORIES} categories in common"
            return [], f"no paired tests: {why}"
        corrected = statistics.holm([test[3] for test in found])
        tests = [(a, b, d, float(p), n) for (a, b, d, _, n), p in zip(found, corrected, strict=True)]
        told = f"Wilcoxon's signed-rank test over categories, p corrected by Holm for {len(tests)} pairs"
        return sorted(tests, key=lambda test: test[3]), told

    def costs(self) -> list[tuple[Row, dict[str, float | None]]]:
        """Per row the means over runs of what `COSTS` names."""
        return [(row, {name: _mean(row, *where) for name, where in COSTS.items()}) for row in self.rows]


def _mean_cell(by_seed: Sequence[dict[int, float]], draws: Sequence[np.ndarray | None]) -> Cell:
    """The mean over categories and seeds; the deviation is that of the seeds' means."""
    mean = float(np.mean([np.mean(list(values.values())) for values in by_seed]))
    same = all(values.keys() == by_seed[0].keys() for values in by_seed)
    sd = statistics.mean_sd([float(np.mean([v[s] for v in by_seed])) for s in by_seed[0]])[1] if same else None
    known = [drawn for drawn in draws if drawn is not None]
    between = statistics.interval(np.mean(known, axis=0)) if len(known) == len(draws) else None
    return Cell(mean, sd, min(len(values) for values in by_seed), between)


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


def _mean(row: Row, part: str, key: str, factor: float) -> float | None:
    costs = [run.cost(part, key, factor) for run in row.all_runs()]
    numbers = [cost for cost in costs if cost is not None]
    return float(np.mean(numbers)) if numbers else None
