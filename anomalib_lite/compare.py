"""Compare finished runs: methods against categories, with seeds, intervals, tests and costs.

    python -m anomalib_lite.compare DIR... [--html FILE] [--csv FILE] [--latex FILE] [--markdown FILE] [--plots DIR]

DIR              folders; every result.json below them is read; damaged and foreign ones are named and left out
--metric NAME    what the tables show: image_auroc (default), image_ap, image_f1max, pixel_auroc, pixel_ap, pixel_f1max,
                 aupro_30, aupro_05
--html FILE      one page that needs no network: tables to sort, curves, heat maps side by side, worst cases first
--csv FILE       one line per run and category, all metrics with all digits
--latex FILE     tables for booktabs
--markdown FILE  the same as Markdown
--plots DIR      dot plots of every metric and curves of every category, as PNG

Runs share a table where data set, files, split and protocol.data agree; what differs is named. Runs that differ in the
seed alone are averaged; those that differ in any other key of their configuration get rows of their own.
Exit codes: 0; 2 for a user error.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: the matrices are small, and threads only wait

from anomalib_lite.cli import program
from anomalib_lite.comparison import export, find_runs, grouping, terminal
from anomalib_lite.console import make_console
from anomalib_lite.errors import UserError


def main() -> None:
    program.prepare()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return
    with program.reported():
        compare(sys.argv[1:])


def compare(arguments: Sequence[str]) -> None:
    parser = program.Parser()
    parser.add_argument("DIR", nargs="+", type=Path)
    parser.add_argument("--metric", default="image_auroc")
    for name in ("html", "csv", "latex", "markdown", "plots"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_intermixed_args(arguments)

    problems: list[str] = []
    runs, left_out = find_runs.read((path.expanduser() for path in options.DIR), problems)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not runs:
        raise UserError(
            f"{find_runs.shorten(map(str, options.DIR))}: no readable result.json below; give other folders"
        )
    tables = grouping.tables(runs)
    metric, metrics = options.metric, list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    if metric not in metrics:
        raise UserError(f"--metric {metric}: the runs have {', '.join(metrics)}; choose one of them")
    console = make_console(width=120)
    for number, table in enumerate(tables, 1):
        terminal.show(console, table, metric, f"table {number}: " * (len(tables) > 1))

    if options.csv:
        save(options.csv, export.to_csv(tables, runs))
    for file, template in ((options.latex, "table.tex"), (options.markdown, "table.md")):
        if file:
            save(file, export.render(template, tables, metric))
    if options.html:
        from anomalib_lite.comparison.page import to_html

        save(options.html, to_html(tables, metric))
    if options.plots:
        from anomalib_lite.comparison.plots import write_plots

        try:
            write_plots(options.plots.expanduser(), tables)
        except OSError as error:
            raise UserError(f"--plots {options.plots}: {error.strerror or error}; choose another folder") from error
    for line in dict.fromkeys(problems):
        print(f"warning: {line}", file=sys.stderr)


def save(file: Path, text: str) -> None:
    """Write a file and make its folder. Raise UserError where that is not possible."""
    try:
        file.expanduser().parent.mkdir(parents=True, exist_ok=True)
        file.expanduser().write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; choose another file") from error


if __name__ == "__main__":
    main()
