"""A comparison as pictures: a dot plot of every metric, curves of every category."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from anomalib_lite.comparison.export import averaged, heading
from anomalib_lite.comparison.tables import Table
from anomalib_lite.comparison.worst_cases import best_rows, curves
from anomalib_lite.metrics.curves import CURVES
from anomalib_lite.metrics.names import name_of

MOST_ROWS = 40  # the best ones: a dot plot of more is not legible
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


def write_plots(folder: Path, tables: Sequence[Table]) -> None:
    """`<metric>.png`, `curves_<category>.png` and with few shots `shots_<metric>.png`, with the table's number in front
    where there are several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for number, table in enumerate(tables, 1):
            prefix = f"{number}_" * (len(tables) > 1)
            for metric in table.metrics:
                plot_metric(folder / f"{prefix}{_safe(metric)}.png", table, metric)
                if table.shots:
                    plot_shots(folder / f"{prefix}shots_{_safe(metric)}.png", table, metric)
            names = [_safe(category) for category in table.categories]
            for at, category in enumerate(table.categories):
                suffix = f"_{at}" * (names.count(names[at]) > 1)
                plot_curves(folder / f"{prefix}curves_{names[at]}{suffix}.png", table, category)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:80]


def plot_metric(file: Path, table: Table, metric: str) -> None:
    """One panel per column and one line per row: the mean over seeds with its bootstrap interval, or, where no cell has
    one, with its deviation.
    """
    rows, columns = best_rows(table, metric, MOST_ROWS), list(table.columns)
    cells = [cell for row in rows for cell in table.cells(row, metric).values()]
    with_intervals = any(cell.interval for cell in cells)
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.6 + 2.4 * across, 0.9 + down * (0.7 + 0.22 * len(rows))), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axis, column in zip(axes, columns, strict=False):
        for y, row in enumerate(rows):
            if cell := table.cells(row, metric).get(column):
                sd = 0 if with_intervals else cell.sd or 0
                low, high = cell.interval or (cell.mean - sd, cell.mean + sd)
                axis.plot([100 * low, 100 * high], [y, y], color="#8fb4d3", linewidth=3, solid_capstyle="round")
                axis.plot(100 * cell.mean, y, "o", color="#0b4f85", markersize=4)
        axis.set_title(heading(column), fontsize=9)
        axis.grid(axis="x", color="#e3e6ea")
        axis.set_axisbelow(True)
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row.full_label for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    meaning = "95 % bootstrap interval over test images" if with_intervals else averaged(cells)
    figure.suptitle(f"{table.title}: {name_of(metric)} in percent, {meaning}", fontsize=9)
    figure.savefig(file, dpi=130)


def plot_shots(file: Path, table: Table, metric: str) -> None:
    """The metric over the number of shots, on a logarithmic axis that ends with all images. One line per method: the
    mean over seeds and draws with its standard deviation.
    """
    figure, lines = Figure(figsize=(6.4, 4), layout="constrained"), table.over_shots(metric)
    axis = figure.subplots()
    place = {shots: shots or 2 * max(number or 0 for number in table.shots) for shots in table.shots}
    for number, (name, cells) in enumerate(lines.items()):
        beside = 1.03 ** (number - (len(lines) - 1) / 2)  # so that error bars don't cover each other
        x = [beside * place[shots] for shots in cells]
        y, sd = [100 * cell.mean for cell in cells.values()], [100 * (cell.sd or 0) for cell in cells.values()]
        axis.errorbar(x, y, sd, label=name, color=f"C{number % 10}", marker="o", markersize=4, capsize=2)
    axis.set_xscale("log", base=2)
    axis.set_xticks([*place.values()], ["all" if shots is None else str(shots) for shots in place])
    axis.set(xlabel="training images per category", ylabel=f"{name_of(metric)} in percent")
    axis.grid(color="#e3e6ea")
    what = heading(list(table.columns)[-1])
    over = averaged(cell for cells in lines.values() for cell in cells.values())
    figure.suptitle(f"{table.dataset}, {what}: {name_of(metric)}, {over}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def plot_curves(file: Path, table: Table, category: str) -> None:
    """One panel per curve and one line per row; nothing is written where no run has curves."""
    rows = best_rows(table, "image_auroc")
    found = [(row.full_label, curves(run, category)) for row in rows if (run := row.first_run(category))]
    names = [name for name in CURVES if any(name in points for _, points in found)]
    if not names:
        return
    figure = Figure(figsize=(2.9 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (label, points) in enumerate(found):
            if name in points:
                axis.plot(*points[name], label=label if name == names[0] else None, color=f"C{number}", linewidth=1.2)
        curve = CURVES[name]
        axis.set(title=name, xlabel=curve.x_name, ylabel=curve.y_name, xlim=(0, curve.limit), ylim=(0, 1.02))
        axis.grid(color="#e3e6ea")
    figure.suptitle(f"{table.title}: {category}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
