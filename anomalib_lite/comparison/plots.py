"""A comparison as pictures: a dot plot of every metric, curves of every category."""

import re
from collections.abc import Sequence
from pathlib import Path

from anomalib_lite.comparison.cells import Table
from anomalib_lite.comparison.export import heading, name_of
from anomalib_lite.comparison.worst_cases import Maps, chosen, run_of
from anomalib_lite.metrics.functional import CURVES

MOST_ROWS = 40  # a dot plot can't show more legibly: the best


def write_plots(folder: Path, tables: Sequence[Table]) -> None:
    """`<metric>.png` and `curves_<category>.png`, with the table's number in front where there are several."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    )
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(tables, 1):
        front = f"{number}_" * (len(tables) > 1)
        for metric in table.metrics:
            dots(folder / f"{front}{_safe(metric)}.png", table, metric)
        names = [_safe(category) for category in table.categories]
        for at, category in enumerate(table.categories):
            again = f"_{at}" * (names.count(names[at]) > 1)
            curves(folder / f"{front}curves_{names[at]}{again}.png", table, category)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:80]


def dots(file: Path, table: Table, metric: str) -> None:
    """A panel a category, a method a line: the mean over seeds with its bootstrap interval, or else its deviation."""
    from matplotlib.figure import Figure

    rows, columns = chosen(table, metric, MOST_ROWS), table.columns
    cells = [table.cells(row, metric) for row in rows]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.6 + 2.4 * across, 0.9 + down * (0.7 + 0.22 * len(rows))), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    intervals = False
    for axis, column in zip(axes, columns, strict=False):
        for y, of in enumerate(cells):
            cell = of.get(column)
            if cell is None:
                continue
            low, high = cell.interval or (cell.mean - (cell.sd or 0), cell.mean + (cell.sd or 0))
            intervals |= cell.interval is not None
            axis.plot([100 * low, 100 * high], [y, y], color="#8fb4d3", linewidth=3, solid_capstyle="round")
            axis.plot(100 * cell.mean, y, "o", color="#0b4f85", markersize=4)
        axis.set_title(heading(column), fontsize=9)
        axis.grid(axis="x", color="#e3e6ea")
        axis.set_axisbelow(True)
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    how = "95 % bootstrap interval over test images" if intervals else "± standard deviation over seeds"
    figure.suptitle(f"{table.title}: {name_of(metric)} in percent, {how}", fontsize=9)
    figure.savefig(file, dpi=130)


def curves(file: Path, table: Table, category: str) -> None:
    """A panel a curve, a line a method; nothing is written where no run has curves."""
    from matplotlib.figure import Figure

    maps, found = Maps(table.problems), []
    for row in chosen(table, "image_auroc"):
        run = run_of(row, category)
        if run:
            found.append((row.label, maps.curves(run, category)))
    names = [name for name in CURVES if any(name in points for _, points in found)]
    if not names:
        return
    figure = Figure(figsize=(2.9 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (label, points) in enumerate(found):
            if name in points:
                axis.plot(*points[name], label=label if name == names[0] else None, color=f"C{number}", linewidth=1.2)
        _, _, x, y, limit = CURVES[name]
        axis.set(title=name, xlabel=x, ylabel=y, xlim=(0, limit), ylim=(0, 1.02))
        axis.grid(color="#e3e6ea")
    figure.suptitle(f"{table.title}: {category}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
