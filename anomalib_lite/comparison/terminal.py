"""A comparison's tables in the terminal."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from anomalib_lite.comparison import export as texts
from anomalib_lite.comparison.published import HEADINGS, Line
from anomalib_lite.comparison.tables import COSTS, Cell, Column, Row, Table
from anomalib_lite.metrics.names import name_of

MOST_TESTS = 20  # pairs that the terminal shows; the other formats hold them all
WIDEST = 44  # characters of a label in a line

T = TypeVar("T")
Place = tuple[str, Column]  # a metric and a column of the table


def warn(kind: str, lines: Sequence[str]) -> None:
    """Print each line once on stderr, after what kind of message it is."""
    for line in dict.fromkeys(lines):
        print(f"{kind}: {line}", file=sys.stderr)


def show(
    output: Console,
    table: Table,
    metrics: Sequence[str],
    number: str = "",
    more: Mapping[str, Callable[[Row], str]] | None = None,
) -> None:
    """Print a table, its notes, its paired tests, and what the methods cost.

    Args:
        metrics: what the columns show, side by side.
        more: heading -> text of a row, for the columns of a further table.
    """
    names = ", ".join(map(name_of, metrics))
    output.print(Text(f"{number}{table.title}: {names}", style="bold"), soft_wrap=True)
    label_width = _label_width(row.label for row in table.rows)
    every_place = [(metric, column) for metric in metrics for column in table.columns]
    for places in _blocks(every_place, lambda place: _width(table, place, metrics), output.width - label_width - 10):
        output.print(_cells(table, places, metrics, label_width))
        output.print()
    best = any(cell.best for row in table.rows for metric in metrics for cell in table.cells(row, metric).values())
    lines = [texts.caption(table, *metrics, best="in bold, marked *" if best else "in bold")]
    for line in dict.fromkeys(lines + [note for metric in metrics for note in texts.notes(table, metric)]):
        output.print(Text(line, style="dim"), soft_wrap=True)
    output.print()
    for metric in metrics:
        if table.shots:
            output.print(_shots_grid(table, metric))
            output.print()
        _show_tests(output, table, metric, f"{name_of(metric)}: " * (len(metrics) > 1))
    label_width = _label_width(row.full_label for row in table.rows)
    if more:
        grid = _grid(["method", *more], label_width=label_width)
        for row in table.rows:
            grid.add_row(Text(row.full_label), *(Text(text(row)) for text in more.values()))
        output.print(grid)
        output.print()
    _show_costs(output, table, label_width)


def _label_width(labels: Iterable[str]) -> int:
    """The width of the first column, with its heading."""
    return min(max(map(len, ("method", *labels))), WIDEST)


def show_board(output: Console, board: Sequence[Line]) -> None:
    """Print published figures beside ours."""
    output.print(Text("published figures and ours, in percent", style="bold"))
    grid = _grid(HEADINGS[:7], labels=4, label_width=22)
    for line in board:
        *names, published, ours, difference = line.texts()[:7]
        grid.add_row(*map(Text, (*names, published, f"{'*' * line.differs}{ours}", difference)))
    output.print(grid)
    text = "* fewer categories or another setting; --markdown and --html say which, and what each published figure is"
    output.print(Text(text, style="dim"), soft_wrap=True)
    output.print()


def _show_costs(output: Console, table: Table, label_width: int) -> None:
    costs = table.costs()
    headings = {name: name.replace(" (", "\n(") for name in COSTS}
    shown = {name: [headings[name], *(texts.amount(of_row[name]) for of_row in costs.values())] for name in COSTS}
    for names in _blocks(list(COSTS), lambda name: _longest_line(shown[name]), output.width - label_width - 2):
        grid = _grid(["method", *(headings[name] for name in names)], label_width=label_width)
        for number, row in enumerate(costs, 1):
            grid.add_row(Text(row.full_label), *(shown[name][number] for name in names))
        output.print(grid)
        output.print()


def _show_tests(output: Console, table: Table, metric: str, name: str) -> None:
    tests = table.tests(metric)
    if not tests:
        return
    grid = _grid([f"{name}method", *texts.TEST_HEADINGS[1:]], labels=2)
    for a, b, difference, p, categories in tests[:MOST_TESTS]:
        grid.add_row(Text(a), Text(b), f"{100 * difference:+.1f}", texts.p_value(p), str(categories))
    output.print(grid)
    if len(tests) > MOST_TESTS:
        more = f"and {len(tests) - MOST_TESTS} more pairs, which --markdown and --html show"
        output.print(Text(more, style="dim"), soft_wrap=True)
    output.print()


def _shots_grid(table: Table, metric: str) -> Grid:
    """One row per method and one column per number of shots."""
    first, *headings = texts.shots_headings(table)
    grid = _grid([f"{name_of(metric)}, {first}", *headings], label_width=WIDEST)
    for name, cells in table.over_shots(metric).items():
        grid.add_row(Text(name), *(_cell(cells.get(shots), with_sd=True) for shots in table.shots))
    return grid


def _grid(headings: Sequence[str], labels: int = 1, label_width: int | None = None) -> Grid:
    """An empty grid, whose first `labels` columns hold names and the others numbers."""
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(headings):
        is_label = number < labels
        width, justify = (label_width, "left") if is_label else (None, "right")
        grid.add_column(Text(name), max_width=width, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return grid


def _blocks(columns: Sequence[T], width: Callable[[T], int], room: int) -> list[list[T]]:
    """The columns in blocks: as many beside each other as there is room for."""
    blocks: list[list[T]] = [[]]
    left = room
    for column in columns:
        needed = width(column) + 3
        if blocks[-1] and left < needed:
            blocks.append([])
            left = room
        blocks[-1].append(column)
        left -= needed
    return blocks


def _width(table: Table, place: Place, metrics: Sequence[str]) -> int:
    """The characters that a column needs; a long name is folded."""
    heading = [line[:16] for line in _heading(place, metrics).split("\n")]
    return max(9, _longest_line([*heading, *(cell.plain for cell in _column(table, place).values())]))


def _longest_line(shown: Sequence[str]) -> int:
    return max(len(line) for text in shown for line in text.split("\n"))


def _heading(place: Place, metrics: Sequence[str]) -> str:
    metric, column = place
    return f"{name_of(metric)}\n" * (len(metrics) > 1) + texts.heading(column)


def _cells(table: Table, places: Sequence[Place], metrics: Sequence[str], label_width: int) -> Grid:
    """The cells of a block of columns; settings have headings where there are several."""
    body = table.body(places[0][0])
    grid = _grid(["method", *(_heading(place, metrics) for place in places), "seeds"], label_width=label_width)
    columns = [_column(table, place) for place in places]
    for setting, rows in body.items():
        if len(body) > 1:
            grid.add_row(Text(setting, style="italic"))
        for row, of_first in rows.items():
            grid.add_row(Text(row.label), *(column[row] for column in columns), texts.seeds_of(of_first))
        grid.add_section()
    return grid


def _column(table: Table, place: Place) -> dict[Row, Text]:
    metric, column = place
    cells = {row: table.cells(row, metric).get(column) for row in table.rows}
    with_sd = any(cell and cell.sd is not None for cell in cells.values())
    return {row: _cell(cell, with_sd) for row, cell in cells.items()}


def _cell(cell: Cell | None, with_sd: bool) -> Text:
    """A cell with its interval below. In a column of deviations a single seed has a dash, so that digits align."""
    if cell is None:
        return Text(texts.percent(None))
    dash = " ±   –" if with_sd and cell.sd is None else ""
    text = Text("*" * cell.best + texts.percent(cell) + dash, style="bold" if cell.best else "")
    return text.append(f"\n{texts.between(cell)}", style="dim not bold") if texts.between(cell) else text
