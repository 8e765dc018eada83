"""Compare finished runs: methods against categories, with seeds, intervals, tests and costs.

    python -m anomalib_lite.compare DIR... [--html FILE] [--csv FILE] [--latex FILE] [--markdown FILE] [--plots DIR]

DIR              folders; every result.json below them is read; damaged and foreign ones are named and left out
--metric NAME    what the tables show: image_auroc (default), image_ap, image_f1max, pixel_auroc, pixel_ap, pixel_f1max,
                 aupro_30, aupro_05, spro_05 (MVTec LOCO), aupimo, pixel_iou, pixel_dice
--html FILE      one page that needs no network: tables to sort, curves, heat maps side by side, worst cases first
--csv FILE       one line per run and category, all metrics with all digits
--latex FILE     tables for booktabs
--markdown FILE  the same as Markdown
--plots DIR      dot plots of every metric, curves of every category, and with few shots every metric over the number of
                 training images, as PNG
--published FILE published figures beside ours: a table that --markdown and --html show too. The checkout has them in
                 experiments/published.yaml

Runs share a table where data set, files, split and protocol.data agree; what differs is named. Runs that differ in the
seed alone are averaged; those that differ in any other key of their configuration get rows of their own. Few shots
(split=shots) and all images of a data set share a table: a group of rows for each number of shots, averaged over
split.seed too, and a table of methods against numbers of shots.
Exit codes: 0; 2 for a user error.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: the matrices are small, and threads only wait

from anomalib_lite.cli import program
from anomalib_lite.comparison import export, find_runs, grouping, published, terminal
from anomalib_lite.comparison.find_runs import Run
from anomalib_lite.comparison.tables import Table
from anomalib_lite.console import make_console
from anomalib_lite.errors import UserError

FILES = ("csv", "latex", "markdown", "html", "plots")  # options with a file or folder to write


def main() -> None:
    program.run_flags(compare, __doc__)


def compare(arguments: Sequence[str]) -> None:
    parser = program.Parser()
    parser.add_argument("DIR", nargs="+", type=Path)
    parser.add_argument("--metric", default="image_auroc")
    for name in (*FILES, "published"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_intermixed_args(arguments)

    entries = published.read(options.published.expanduser()) if options.published else []
    problems: list[str] = []
    runs, left_out = find_runs.read((path.expanduser() for path in options.DIR), problems)
    if not runs and not entries:
        terminal.warn("left out", left_out)
        raise UserError(
            f"{find_runs.shorten(map(str, options.DIR))}: no readable result.json below; give other folders"
        )
    tables = grouping.tables(runs)
    metric, metrics = options.metric, list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    if metric not in metrics and runs:
        raise UserError(f"--metric {metric}: the runs have {', '.join(metrics)}; choose one of them")
    board = published.board(entries, tables)
    write_files(options, tables, runs, board)  # before anything is printed: the reader of the output may go away
    terminal.warn("left out", left_out)
    console = make_console(width=120)
    try:
        for number, table in enumerate(tables, 1):
            terminal.show(console, table, [metric], f"table {number}: " * (len(tables) > 1))
        if board:
            terminal.show_board(console, board)
    finally:
        terminal.warn("warning", problems)


def write_files(
    options: Namespace, tables: Sequence[Table], runs: Sequence[Run], board: Sequence[published.Line]
) -> None:
    """Write what the options ask for. A file that can't be written does not keep the others from being written.

    Raise UserError for all files that can't be written.
    """

    def page() -> str:
        from anomalib_lite.comparison.page import to_html

        return to_html(tables, options.metric, board)

    texts = {
        "csv": lambda: export.to_csv(tables, runs),
        "latex": lambda: export.render("table.tex", tables, options.metric),
        "markdown": lambda: export.render("table.md", tables, options.metric, board=board),
        "html": page,
    }
    failures = []
    for name in FILES:
        if (file := getattr(options, name)) is None:
            continue
        try:
            file.expanduser().parent.mkdir(parents=True, exist_ok=True)
            if name == "plots":
                from anomalib_lite.comparison.plots import write_plots

                write_plots(file.expanduser(), tables)
            else:
                file.expanduser().write_text(texts[name](), encoding="utf-8", errors="replace")
        except OSError as error:
            failures.append(f"--{name} {file}: {error.strerror or error}; choose another path")
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    main()
