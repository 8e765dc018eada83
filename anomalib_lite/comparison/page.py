"""A comparison as one page that needs nothing but itself: every name is escaped, and the page may load nothing."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anomalib_lite.comparison.export import render
from anomalib_lite.comparison.published import Line
from anomalib_lite.comparison.tables import Row, Table
from anomalib_lite.comparison.worst_cases import Case, best_rows, curves, worst_cases
from anomalib_lite.metrics.curves import CURVES, Curve

MOST_CASES = 24  # a category
MOST_TESTS = 300
MOST_CATEGORIES = 60  # with curves and heat maps, over all tables
BYTES = 8_000_000  # for pictures


@dataclass
class Pictures:
    """Curves and heat maps of a category. A colour is the number of a row among the best ones."""

    category: str
    rows: list[tuple[int, Row]]
    panels: list[tuple[str, Curve, list[tuple[int, str]]]]  # title, axes, and per line its colour and SVG path
    cases: list[Case]


def to_html(tables: Sequence[Table], metric: str, board: Sequence[Line] = ()) -> str:
    """The page, with `metric` shown first and the lines of `published.board` at its end."""
    script = "\n" + Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    budget = BYTES // max(1, min(sum(len(table.categories) for table in tables), MOST_CATEGORIES))
    left, pictures = MOST_CATEGORIES, []
    for table in tables:
        rows, categories = best_rows(table, metric), table.categories[: max(left, 0)]
        left -= len(table.categories)
        pictures.append((len(rows), len(categories), list(pictures_of(rows, categories, budget))))
    return render(
        "page.html",
        tables,
        metric,
        board=board,
        title="Comparison: " + ", ".join(dict.fromkeys(table.title for table in tables)),
        metrics=list(dict.fromkeys(name for table in tables for name in table.metrics)),
        pictures=pictures,
        most_tests=MOST_TESTS,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def pictures_of(rows: list[Row], categories: list[str], budget: int) -> Iterator[Pictures]:
    """Of each category that has any, with images of about `budget` bytes at most."""
    for category in categories:
        coloured = [(number, row) for number, row in enumerate(rows) if category in row.runs]
        points = [(number, curves(run, category)) for number, row in coloured if (run := row.first_run(category))]
        panels = []
        for title, curve in CURVES.items():
            lines = [(number, svg_path(*found[title], curve.limit)) for number, found in points if title in found]
            if lines:
                panels.append((title, curve, lines))
        cases = worst_cases(category, [row for _, row in coloured], MOST_CASES, budget)
        if panels or cases:
            yield Pictures(category, coloured, panels, cases)


def svg_path(x: np.ndarray, y: np.ndarray, limit: float) -> str:
    """The line through the points, in the frame of page.html's panels."""
    points = zip(34 + 196 * np.clip(x / limit, 0, 1), 202 - 180 * np.clip(y, 0, 1), strict=True)
    return "M" + " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
