"""A comparison as CSV or by a template (table.md, table.tex, page.html), and the texts that all formats share."""

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from anomalib_lite.comparison.find_runs import Run, shorten
from anomalib_lite.comparison.published import HEADINGS
from anomalib_lite.comparison.statistics import DRAWS
from anomalib_lite.comparison.tables import COSTS, FEWEST_CATEGORIES, Cell, Column, Over, Row, Table, shots_text
from anomalib_lite.metrics.names import name_of

TEST_HEADINGS = ("method", "against", "difference", "corrected p", "categories")
LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"–": "--", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_"}


def heading(column: Column) -> str:
    return column.value if isinstance(column, Over) else column


def seeds_of(cells: dict[Column, Cell]) -> str:
    """The number of seeds: 3, or 1–3 where it differs between categories."""
    counts = {cell.seeds for column, cell in cells.items() if not isinstance(column, Over)} or {0}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def percent(cell: Cell | None) -> str:
    """98.1 ± 0.2; without the deviation for a single seed."""
    return "–" if cell is None else f"{100 * cell.mean:.1f}{deviation(cell)}"


def deviation(cell: Cell) -> str:
    return "" if cell.sd is None else f" ± {100 * cell.sd:.1f}"


def between(cell: Cell | None) -> str:
    """The interval, 96.5–99.3, or nothing."""
    return f"{100 * cell.interval[0]:.1f}–{100 * cell.interval[1]:.1f}" if cell and cell.interval else ""


def amount(value: float | None) -> str:
    """A cost with three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def shots_headings(table: Table) -> list[str]:
    """The headings of a table of methods over the number of shots; empty where it does not differ."""
    what = heading(list(table.columns)[-1])
    return [f"few shots, {what}", *map(shots_text, table.shots)] if table.shots else []


def averaged(cells: Iterable[Cell]) -> str:
    """What the numbers of these cells are with regard to seeds."""
    cells = list(cells)
    if any(cell.sd is not None for cell in cells):
        return "mean ± standard deviation over seeds"
    return "mean over seeds" if any(cell.seeds > 1 for cell in cells) else "one seed"


def caption(table: Table, *metrics: str, best: str = "in bold", intervals: bool = True) -> str:
    """The line under a table that says what its numbers are."""
    names = ", ".join(map(name_of, metrics))
    cells = [cell for row in table.rows for metric in metrics for cell in table.cells(row, metric).values()]
    text = f"{names} in percent, {averaged(cells)}, the best of a setting {best}"
    with_intervals = intervals and any(cell.interval for cell in cells)
    return text + ("; 95 % bootstrap intervals over test images (1,000 resamples)" if with_intervals else "")


def notes(table: Table, metric: str) -> list[str]:
    """All notes under a table, on its runs first."""
    lines = [*table.notes, *_missing(table, metric)]
    if tests := table.tests(metric):
        lines.append(f"Wilcoxon's signed-rank test over categories, p corrected by Holm for {len(tests)} pairs")
    else:
        alone = all(len(rows) < 2 for rows in table.body(metric).values())
        why = "one method alone" if alone else f"fewer than {FEWEST_CATEGORIES} categories in common"
        lines.append(f"no paired tests: {why}")
    lines += [
        f"{over.value}: {', '.join(table.columns[over])}" for over in (Over.HEAD, Over.TAIL) if over in table.columns
    ]
    if table.large and metric in DRAWS and metric != "image_auroc":
        lines.append("no intervals of this metric for so many runs or test images")
    return lines


def _missing(table: Table, metric: str) -> Iterator[str]:
    """Why some rows have no mean over categories."""
    labels: dict[str, list[str]] = {}
    for row in table.rows:
        absent = [category for category in table.categories if category not in table.cells(row, metric)]
        if absent:
            labels.setdefault(shorten(absent), []).append(row.full_label)
    no_mean = ", so no mean" if len(table.categories) > 1 else ""
    for absent_text, of in labels.items():
        yield f"without {metric} of {absent_text}{no_mean}: {shorten(of)}"


def to_csv(tables: Sequence[Table], runs: Sequence[Run]) -> str:
    """One line per run and category: all metrics and costs with full digits, nothing averaged."""
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["table", "run", "dataset", "split", "shots", "setting", "method", "label", "variant", "backbone", "weights"]
    writer.writerow([*head, "seed", "split.seed", "category", "group", *metrics, *COSTS, "fingerprint"])
    rows: dict[Run, tuple[int, Table, Row]] = {}
    for number, table in enumerate(tables, 1):
        rows |= {run: (number, table, row) for row in table.rows for run in row.all_runs()}
    for run in runs:
        if run not in rows:
            continue  # a newer run has the same seed
        number, table, row = rows[run]
        r, split = run.result, run.result.get("split") or {}
        first = [number, run.folder, table.dataset, split.get("name"), row.shots, r["setting"], r["method"], row.label]
        first += [
            r.get("variant"),
            (r.get("backbone") or {}).get("name"),
            r.get("weights"),
            r["seed"],
            split.get("seed"),
        ]
        costs = [run.cost(*where) for where in COSTS.values()]
        for category in r["categories"]:
            values = [run.value(category, metric) for metric in metrics]
            group = next((name for name in ("head", "tail") if category in (split.get(name) or [])), None)
            writer.writerow([*first, category, group, *values, *costs, r["data"]["fingerprint"]])
    return text.getvalue()


def render(template: str, tables: Sequence[Table], metric: str, **context: Any) -> str:
    """A template of this folder; in it, `texts` is this module, and filters escape names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        line_statement_prefix="%%",
    )
    environment.filters |= {of.__name__: of for of in (amount, heading, latex, markdown, name_of)}
    context = {"board": (), "board_headings": HEADINGS} | context
    context |= {"tables": tables, "metric": metric, "texts": sys.modules[__name__]}
    return environment.get_template(template).render(context).rstrip() + "\n"


def markdown(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in re.sub(r"\s+", " ", text))
