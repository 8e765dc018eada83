"""Compare finished runs: methods against categories, with seeds, intervals, tests and costs.

    python -m anomalib_lite.compare DIR... [--html FILE] [--csv FILE] [--latex FILE] [--markdown FILE] [--plots DIR]

DIR              folders; every result.json below them is read, damaged and foreign ones are named and left out
--metric NAME    what the tables show: image_auroc (default), image_ap, image_f1max, pixel_auroc, pixel_ap, pixel_f1max,
                 aupro_30, aupro_05
--html FILE      one page that needs no network: tables to sort, curves, heat maps side by side, worst cases first
--csv FILE       a run and category a row, all metrics with all digits
--latex FILE     tables for booktabs
--markdown FILE  the same as Markdown
--plots DIR      dot plots of every metric and curves of every category, as PNG

Runs share a table where data set, files, split and protocol.data agree; what differs is named. Runs that differ in the
seed alone are averaged; those that differ in any other key of their configuration are rows of their own.
Exit codes: 0; 2 for an error that is yours to mend.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: small matrices, for which threads only wait

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from anomalib_lite.cli import program as cli
from anomalib_lite.comparison import export as formats
from anomalib_lite.comparison import find_runs as runset
from anomalib_lite.comparison import grouping
from anomalib_lite.comparison.cells import COSTS, Cell, Column, Table
from anomalib_lite.errors import UserError

MOST_TESTS = 20  # pairs that the terminal shows; the other formats hold them all


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return
    with cli.reported():
        compare(sys.argv[1:])


def compare(arguments: Sequence[str]) -> None:
    parser = cli.Parser()
    parser.add_argument("DIR", nargs="+", type=Path)
    parser.add_argument("--metric", default="image_auroc")
    for name in ("html", "csv", "latex", "markdown", "plots"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_intermixed_args(arguments)

    problems: list[str] = []
    runs, left_out = runset.read(path.expanduser() for path in options.DIR)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not runs:
        raise UserError(f"{runset.some([str(path) for path in options.DIR])}: no readable result.json below")
    tables = grouping.tables(runs, problems)
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    if options.metric not in metrics:
        raise UserError(f"--metric {options.metric}: the runs have {', '.join(metrics)}")
    console = Console(width=None if Console().is_terminal else 120)
    for number, table in enumerate(tables, 1):
        show(console, table, options.metric, f"table {number}: " * (len(tables) > 1))

    if options.csv:
        save(options.csv, formats.to_csv(tables, runs))
    if options.latex:
        save(options.latex, formats.to_latex(tables, options.metric))
    if options.markdown:
        save(options.markdown, formats.to_markdown(tables, options.metric))
    if options.html:
        from anomalib_lite.comparison.page import to_html

        save(options.html, to_html(tables, options.metric))
    if options.plots:
        from anomalib_lite.comparison.plots import write_plots

        try:
            write_plots(options.plots, tables)
        except OSError as error:
            raise UserError(f"--plots {options.plots}: {error.strerror or error}; choose another folder") from error
    for line in dict.fromkeys(problems):
        print(f"warning: {line}", file=sys.stderr)


def save(file: Path, text: str) -> None:
    """Write a file, its folder too; UserError where that can't be."""
    try:
        file.expanduser().parent.mkdir(parents=True, exist_ok=True)
        file.expanduser().write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; choose another file") from error


def show(console: Console, table: Table, metric: str, number: str = "") -> None:
    """Print a table, what is to be said of it, and what the methods cost."""
    rule = Text(f"{number}{table.title}: {formats.name_of(metric)}", style="bold")
    console.print(rule, soft_wrap=True)
    body = table.body(metric)
    columns, width = table.columns, _label_width(table)
    every = [(column, cell) for rows in body.values() for _, cells in rows for column, cell in cells.items()]
    marked = any(cell.best for _, cell in every)
    deviating = {column for column, cell in every if cell.sd is not None}
    shown = {
        column: [formats.percent(cells.get(column)) for rows in body.values() for _, cells in rows]
        for column in columns
    }
    blocks: list[list[Column]] = [[]]
    room = console.width - width - 10
    for column in columns:  # as many categories beside each other as there is room for
        needed = max(len(text) for text in [*shown[column], formats.heading(column)[:16], " " * 9]) + 3
        if blocks[-1] and room < needed:
            blocks.append([])
            room = console.width - width - 10
        blocks[-1].append(column)
        room -= needed
    for block in blocks:
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False)
        grid.add_column("method", max_width=width, overflow="fold")
        for column in block:
            grid.add_column(Text(formats.heading(column)), justify="right", overflow="fold")
        grid.add_column("seeds", justify="right")
        for setting, rows in body.items():
            if len(body) > 1:
                grid.add_row(Text(setting, style="italic"))
            for row, cells in rows:
                told = [_cell(cells.get(column), column in deviating) for column in block]
                grid.add_row(Text(row.label), *told, formats.seeds_of(cells))
            grid.add_section()
        console.print(grid)
        console.print()
    _say(console, formats.how(metric, "in bold, marked *" if marked else "in bold"))
    for note in formats.notes(table, metric):
        _say(console, note)
    console.print()
    _show_more(console, table, metric)


def _show_more(console: Console, table: Table, metric: str) -> None:
    """Paired tests, costs."""
    tests, _ = table.tests(metric)
    if tests:
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False)
        for name in ("method", "against", "difference", "corrected p", "categories"):
            grid.add_column(name, justify="left" if name in ("method", "against") else "right", overflow="fold")
        for a, b, difference, p, n in tests[:MOST_TESTS]:
            grid.add_row(Text(a), Text(b), f"{100 * difference:+.1f}", formats.p_value(p), str(n))
        console.print(grid)
        if len(tests) > MOST_TESTS:
            _say(console, f"and {len(tests) - MOST_TESTS} more pairs, which --markdown and --html show")
        console.print()
    _grid(console, table, list(COSTS), [(row.label, [*map(formats.amount, c.values())]) for row, c in table.costs()])


def _grid(console: Console, table: Table, names: list[str], rows: list[tuple[str, list[str]]]) -> None:
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False)
    grid.add_column("method", max_width=_label_width(table), overflow="fold")
    for name in names:
        grid.add_column(name.replace(" (", "\n("), justify="right")
    for name, cells in rows:
        grid.add_row(Text(name), *cells)
    console.print(grid)
    console.print()


def _label_width(table: Table) -> int:
    return min(max(len(row.label) for row in table.rows), 44)


def _cell(cell: Cell | None, deviations: bool) -> Text:
    """A column's cell; in a column of deviations a single seed's is a dash, so that digits are aligned."""
    best = cell is not None and cell.best
    single = " ±   –" if deviations and cell is not None and cell.sd is None else ""
    text = Text("*" * best + formats.percent(cell) + single, style="bold" if best else "")
    return text.append(f"\n{formats.between(cell)}", style="dim not bold") if formats.between(cell) else text


def _say(console: Console, line: str) -> None:
    console.print(Text(line, style="dim"), soft_wrap=True)


if __name__ == "__main__":
    main()
