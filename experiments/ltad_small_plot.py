"""Tables and plot of ltad_small: python experiments/ltad_small_plot.py DIR... [--base ROW]

The runs are those below the folders. The tables go to the standard output, the plot to experiments/ltad_small.png.
Means are over cells, a profile and an order of the categories each; intervals are of 95 % over seeds within cells
(Student's t, the cells' pooled variance). With --base the last columns are the differences to this row, for head, tail
and all, and there is no plot. With one seed the intervals of differences are over the cells.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro_30": "AUPRO@0.3"}
GROUPS = ("head", "tail", "all")
BASE = "ltad"
Cells = dict[tuple[str, ...], dict[int, float]]  # (profile, order...) -> seed -> value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--base", default=BASE)
    given = parser.parse_args()
    compared, whose = (("tail",), "LTAD's") if given.base == BASE else (GROUPS, "the base's")
    values: dict[tuple[str, str, str], Cells] = defaultdict(lambda: defaultdict(dict))  # of (row, group, metric)
    for folder in given.folders:
        for file in sorted(Path(folder).rglob("result.json")):
            result = json.loads(file.read_text())
            config = json.loads((file.parent / "checkpoints" / "config.json").read_text())["config"]
            cell = (result["split"]["profile"], *result["split"]["order"])
            for group in GROUPS:
                found = result["metrics"] if group == "all" else result["groups"][group]
                for metric in METRICS:
                    values[named(result["method"], config), group, metric][cell][result["seed"]] = found[metric]
    rows = sorted({row for row, _, _ in values})
    profiles = sorted({cell[0] for cells in values.values() for cell in cells})
    parts = [(profile, group) for profile in profiles for group in ("head", "tail")]
    for metric, title in METRICS.items():
        less = " | ".join(f"{group}, less {whose}" for group in compared)
        print(f"\n| {title} | runs | {' | '.join(', '.join(part) for part in parts)} | all | {less} |")
        print("|---" * (3 + len(parts) + len(compared)) + "|")
        for row in rows:
            cells = [show(of(values[row, group, metric], profile)) for profile, group in parts]
            whole = values[row, "all", metric]
            each = [paired(values[row, group, metric], values[given.base, group, metric]) for group in compared]
            less = " | ".join(show(cells, "+") if row != given.base else "" for cells in each)
            runs = sum(len(seeds) for seeds in whole.values())
            print(f"| {row} | {runs} | {' | '.join(cells)} | {show(whole)} | {less} |")

    if given.base != BASE:
        return
    figure, axes = plt.subplots(1, len(METRICS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for group, colour, shift in (("head", "C0", -0.12), ("tail", "C1", 0.12)):
            points = [mean_and_half_width(values[row, group, metric]) for row in rows]
            axis.errorbar(
                [100 * mean for mean, _ in points],
                [i + shift for i in range(len(rows))],
                xerr=[100 * half for _, half in points],
                fmt="o",
                ms=4,
                color=colour,
                label=group,
            )
        axis.set(title=f"{title}, %", yticks=range(len(rows)), yticklabels=rows)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[-1].legend()
    figure.savefig(Path(__file__).with_name("ltad_small.png"), dpi=110)


def named(method: str, config: dict) -> str:
    """ltad, ltad without semantic classifier, uniad balanced, ltad between images, balanced."""
    settings = config["method"]
    without = [] if settings.get("classifier_weight", settings.get("semantic", 1)) else ["semantic classifier"]
    without += [] if settings.get("fill", "") is not None else ["synthesis"]
    balanced = ", balanced" if config["data"]["balanced"] else ""
    method += " between images" * (settings.get("synthesis") == "between" and settings["fill"] is not None)
    return method + f" without {' and '.join(without)}" * bool(without) + balanced


def of(cells: Cells, profile: str) -> Cells:
    return {cell: seeds for cell, seeds in cells.items() if cell[0] == profile}


def paired(cells: Cells, base: Cells) -> Cells:
    """Differences of runs with the same split and seed; as one cell where no cell has two seeds."""
    found = {
        cell: {s: v - base[cell][s] for s, v in seeds.items() if s in base.get(cell, {})}
        for cell, seeds in cells.items()
    }
    if any(len(seeds) > 1 for seeds in found.values()):
        return found
    return {("all",): dict(enumerate(value for seeds in found.values() for value in seeds.values()))}


def mean_and_half_width(cells: Cells) -> tuple[float, float]:
    """Mean of the cells' means; half the 95 % interval, NaN where no cell has two seeds."""
    seeds = [list(values.values()) for values in cells.values() if values]
    mean = statistics.mean(statistics.mean(values) for values in seeds)
    free = sum(len(values) - 1 for values in seeds)
    if not free:
        return mean, math.nan
    pooled = sum(statistics.variance(values) * (len(values) - 1) for values in seeds if len(values) > 1) / free
    error = math.sqrt(sum(pooled / len(values) for values in seeds)) / len(seeds)
    return mean, float(student.ppf(0.975, free)) * error


def show(cells: Cells, sign: str = "") -> str:
    if not any(cells.values()):
        return ""
    mean, half = mean_and_half_width(cells)
    return f"{100 * mean:{sign}.1f}" + f" ± {100 * half:.1f}" * (not math.isnan(half))


if __name__ == "__main__":
    main()
