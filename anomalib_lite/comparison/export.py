"""A comparison as CSV, LaTeX and Markdown, and what the formats share."""

import csv
import io
import re
from collections.abc import Callable, Sequence

from anomalib_lite.comparison.cells import COSTS, Cell, Column, Over, Row, Table
from anomalib_lite.comparison.find_runs import Run
from anomalib_lite.comparison.statistics import DRAWS

HEADINGS = {"auroc": "AUROC", "ap": "AP", "f1max": "F1-max"}


def name_of(metric: str) -> str:
    """image_auroc is image AUROC, aupro_30 is AUPRO @0.3."""
    level, _, name = metric.partition("_")
    if level == "aupro" and name.isdigit():
        return f"AUPRO @{int(name) / 100:g}"
    return f"{level} {HEADINGS.get(name, name)}" if name in HEADINGS else metric


def heading(column: Column) -> str:
    return column.value if isinstance(column, Over) else column


def seeds_of(cells: dict[Column, Cell]) -> str:
    """The number of seeds: 3, or 1–3 where it differs between categories."""
    counts = {cell.seeds for column, cell in cells.items() if not isinstance(column, Over)} or {0}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def percent(cell: Cell | None, pm: str = " ± ") -> str:
    """98.1 ± 0.2; without the deviation for a single seed."""
    if cell is None:
        return "–"
    return f"{100 * cell.mean:.1f}" + ("" if cell.sd is None else f"{pm}{100 * cell.sd:.1f}")


def between(cell: Cell | None) -> str:
    """The interval, 96.5–99.3, or nothing."""
    return f"{100 * cell.interval[0]:.1f}–{100 * cell.interval[1]:.1f}" if cell and cell.interval else ""


def amount(value: float | None) -> str:
    """A cost with three digits that count."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def how(metric: str, best: str = "in bold", intervals: bool = True) -> str:
    """The line under a table that says what its numbers are."""
    told = f"{name_of(metric)} in percent, mean ± standard deviation over seeds, the best of a setting {best}"
    below = intervals and metric in DRAWS
    return told + ("; 95 % bootstrap intervals over test images (1,000 resamples)" if below else "")


def notes(table: Table, metric: str) -> list[str]:
    """All that is to be said under a table."""
    told = [*table.notes, *table.missing(metric), table.tests(metric)[1]]
    told += [f"{over.value}: {', '.join(names)}" for over, names in table.members.items() if over is not Over.MEAN]
    if table.large and metric in DRAWS and metric != "image_auroc":
        told.append("no intervals of this metric for so many runs")
    return told


def to_csv(tables: Sequence[Table], runs: Sequence[Run]) -> str:
    """A run and category a row: all metrics and costs with full digits, nothing averaged."""
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["table", "run", "dataset", "split", "setting", "method", "label", "variant", "backbone", "weights", "seed"]
    writer.writerow([*head, "category", "group", *metrics, *COSTS, "fingerprint"])
    rows: dict[int, tuple[int, Row]] = {}
    for number, table in enumerate(tables, 1):
        rows |= {id(run): (number, row) for row in table.rows for run in row.all_runs()}
    for run in runs:
        if id(run) not in rows:
            continue  # run again with the same seed
        number, row = rows[id(run)]
        r = run.result
        first = [number, run.folder, r["dataset"], (r.get("split") or {}).get("name"), r["setting"], r["method"]]
        first += [row.label, r.get("variant"), (r.get("backbone") or {}).get("name"), r.get("weights"), r["seed"]]
        costs = [run.cost(*where) for where in COSTS.values()]
        split = r.get("split") or {}
        for category in r["categories"]:
            values = [run.value(category, metric) for metric in metrics]
            group = next((name for name in ("head", "tail") if category in (split.get(name) or [])), None)
            writer.writerow([*first, category, group, *values, *costs, r["data"]["fingerprint"]])
    return text.getvalue()


def to_markdown(tables: Sequence[Table], metric: str) -> str:
    """The tables, their costs, tests and notes."""
    lines = []
    for table in tables:
        names = [_md(heading(column)) for column in table.columns]
        lines += [f"## {_md(table.title)}", "", _line(["method", *names, "seeds"]), _rule(len(names) + 1)]
        body = table.body(metric)
        for setting, rows in body.items():
            if len(body) > 1:
                lines.append(_line([f"*{_md(setting)}*", *[""] * (len(names) + 1)]))
            for row, cells in rows:
                told = [_md_cell(cells.get(column)) for column in table.columns]
                lines.append(_line([_md(row.label), *told, seeds_of(cells)]))
        lines += ["", f"{how(metric)}."]
        lines += ["", *(f"- {_md(note)}" for note in notes(table, metric)), ""]
        tests = table.tests(metric)[0]
        if tests:
            lines += [_line(["method", "against", "difference", "corrected p", "categories"]), _rule(4)]
            lines += [_line([_md(a), _md(b), f"{100 * d:+.1f}", p_value(p), str(n)]) for a, b, d, p, n in tests]
            lines.append("")
        lines += [_line(["method", *COSTS]), _rule(len(COSTS))]
        lines += [_line([_md(row.label), *map(amount, costs.values())]) for row, costs in table.costs()]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(numbers: int) -> str:
    return "|---" + "|---:" * numbers + "|"


def _md(text: str | None) -> str:
    text = re.sub(r"\s+", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def _md_cell(cell: Cell | None) -> str:
    text = percent(cell)
    if cell and cell.best:
        text = f"**{text}**"
    return text + (f" [{between(cell)}]" if between(cell) else "")


LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"–": "--", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_"}


def latex(text: str | None) -> str:
    """Text as LaTeX shows it."""
    return "".join(LATEX.get(character, character) for character in re.sub(r"\s+", " ", str(text)))


def to_latex(tables: Sequence[Table], metric: str) -> str:
    r"""A table environment each, with booktabs rules; a heading per setting where there are several."""
    lines = ["% \\usepackage{booktabs}"]
    for table in tables:
        columns, body = table.columns, table.body(metric)
        rule: Callable[[str], str] = lambda name: f"\\{name}rule"  # noqa: E731
        lines += [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{latex(table.title)}: {latex(how(metric, intervals=False))}.}}",
        ]
        lines += [f"\\begin{{tabular}}{{l{'r' * len(columns)}r}}", rule("top")]
        lines += [" & ".join(["method", *(latex(heading(c)) for c in columns), "seeds"]) + r" \\", rule("mid")]
        for number, (setting, rows) in enumerate(body.items()):
            if len(body) > 1:
                lines += [rule("mid")] * (number > 0)
                lines.append(f"\\multicolumn{{{len(columns) + 2}}}{{l}}{{\\textit{{{latex(setting)}}}}} \\\\")
            for row, cells in rows:
                told = [_latex_cell(cells.get(column)) for column in columns]
                lines.append(" & ".join([latex(row.label), *told, latex(seeds_of(cells))]) + r" \\")
        lines += [rule("bottom"), r"\end{tabular}"]
        lines += [f"% {re.sub(chr(10), ' ', note)}" for note in notes(table, metric)]
        lines += [r"\end{table}", ""]
    return "\n".join(lines)


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    number = f"{100 * cell.mean:.1f}"
    number = f"\\textbf{{{number}}}" if cell.best else number
    return number + ("" if cell.sd is None else f" $\\pm$ {100 * cell.sd:.1f}")
