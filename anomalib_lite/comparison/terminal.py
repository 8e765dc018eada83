"""A comparison's tables in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from anomalib_lite.comparison import export as texts
from anomalib_lite.comparison.tables import COSTS, Cell, Column, Table

MOST_TESTS = 20  # pairs that the terminal shows; the other formats hold them all


def show(console: Console, table: Table, metric: str, number: str = "") -> None:
    """Print a table, its notes, its paired tests, and what the methods cost."""
    console.print(Text(f"{number}{table.title}: {texts.name_of(metric)}", style="bold"), soft_wrap=True)
    label_width = min(max(len(row.label) for row in table.rows), 44)
    for columns in _blocks(table, metric, console.width - label_width - 10):
        console.print(_cells(table, metric, columns, label_width))
        console.print()
    best = any(cell.best for row in table.rows for cell in table.cells(row, metric).values())
    lines = [texts.caption(metric, "in bold, marked *" if best else "in bold"), *texts.notes(table, metric)]
    for line in lines:
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    if tests := table.tests(metric):
        grid = _grid(texts.TEST_HEADINGS, labels=2)
        for a, b, difference, p, categories in tests[:MOST_TESTS]:
            grid.add_row(Text(a), Text(b), f"{100 * difference:+.1f}", texts.p_value(p), str(categories))
        console.print(grid)
        if len(tests) > MOST_TESTS:
            more = f"and {len(tests) - MOST_TESTS} more pairs, which --markdown and --html show"
            console.print(Text(more, style="dim"), soft_wrap=True)
        console.print()
    label_width = min(max(len(row.full_label) for row in table.rows), 44)
    grid = _grid(["method", *(name.replace(" (", "\n(") for name in COSTS)], label_width=label_width)
    for row, costs in table.costs().items():
        grid.add_row(Text(row.full_label), *map(texts.amount, costs.values()))
    console.print(grid)
    console.print()


def _grid(headings: Sequence[str], labels: int = 1, label_width: int | None = None) -> Grid:
    """An empty grid, whose first `labels` columns hold names and the others numbers."""
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(headings):
        is_label = number < labels
        width, justify = (label_width, "left") if is_label else (None, "right")
        grid.add_column(Text(name), max_width=width, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return grid


def _blocks(table: Table, metric: str, room: int) -> list[list[Column]]:
    """The columns in blocks: as many beside each other as there is room for."""
    blocks: list[list[Column]] = [[]]
    left = room
    for column in table.columns:
        cells = [texts.percent(table.cells(row, metric).get(column)) for row in table.rows]
        needed = max(len(text) for text in [*cells, texts.heading(column)[:16], " " * 9]) + 3
        if blocks[-1] and left < needed:
            blocks.append([])
            left = room
        blocks[-1].append(column)
        left -= needed
    return blocks


def _cells(table: Table, metric: str, columns: Sequence[Column], label_width: int) -> Grid:
    """The cells of a block of columns; settings have headings where there are several."""
    body = table.body(metric)
    grid = _grid(["method", *map(texts.heading, columns), "seeds"], label_width=label_width)
    every = [cells for rows in body.values() for cells in rows.values()]
    with_sd = {column for column in columns if any(column in of and of[column].sd is not None for of in every)}
    for setting, rows in body.items():
        if len(body) > 1:
            grid.add_row(Text(setting, style="italic"))
        for row, cells in rows.items():
            shown = [_cell(cells.get(column), column in with_sd) for column in columns]
            grid.add_row(Text(row.label), *shown, texts.seeds_of(cells))
        grid.add_section()
    return grid


def _cell(cell: Cell | None, with_sd: bool) -> Text:
    """A cell with its interval below. In a column of deviations a single seed has a dash, so that digits align."""
    if cell is None:
        return Text(texts.percent(None))
    dash = " ±   –" if with_sd and cell.sd is None else ""
    text = Text("*" * cell.best + texts.percent(cell) + dash, style="bold" if cell.best else "")
    return text.append(f"\n{texts.between(cell)}", style="dim not bold") if texts.between(cell) else text
