"""Table and plot of the norm study from its runs' result.json: python experiments/norm_occ_norms_plot.py SWEEPS.

SWEEPS is the folder with norm_occ_norms/, norm_occ_norms_closed_form/ and norm_occ_schedule/ (outputs/sweeps). Writes
norm_occ_norms.png beside this file and prints the tables of norm_occ_norms.md.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

CATEGORIES = ("bottle", "toothbrush")


def runs(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(configuration, result) of every finished run below a sweep's folder."""
    return [
        (json.loads((file.parent / "checkpoints" / "config.json").read_text())["config"], json.loads(file.read_text()))
        for file in sorted(folder.glob("*/result.json"))
    ]


def grouped(found, key, metric="image_auroc") -> dict[Any, list[float]]:
    """Metric of the runs by what `key(configuration, result)` gives, seeds together."""
    values = defaultdict(list)
    for cfg, result in found:
        values[key(cfg, result)].append(result["metrics"][metric])
    return values


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main(sweeps: Path) -> None:
    curves = grouped(
        runs(sweeps / "norm_occ_norms"), lambda c, r: (c["method"]["target"], r["categories"][0], c["method"]["norm"])
    )
    for (_, category, norm), values in grouped(
        runs(sweeps / "norm_occ_norms_closed_form"), lambda c, r: ("", r["categories"][0], c["method"]["norm"])
    ).items():
        curves["closed form", category, norm] = values
    norms = sorted({norm for *_, norm in curves})
    print("| category | target | " + " | ".join(f"{norm:g}" for norm in norms) + " |\n|---|---|" + "---|" * len(norms))
    figure, axes = plt.subplots(1, len(CATEGORIES), figsize=(9, 3.4), sharey=True)
    for axis, category in zip(axes, CATEGORIES, strict=True):
        for target, marker in (("point", "o"), ("shell", "s"), ("closed form", "^")):
            row = [curves.get((target, category, norm), []) for norm in norms]
            print(f"| {category} | {target} | " + " | ".join(cell(values) if values else "–" for values in row) + " |")
            places = [i for i, values in enumerate(row) if values]
            mean = [statistics.mean(row[i]) for i in places]
            spread = [statistics.stdev(row[i]) if len(row[i]) > 1 else 0 for i in places]
            axis.errorbar(places, mean, spread, marker=marker, capsize=3, label=target)
        axis.set(title=category, xlabel="m / r₀", xticks=range(len(norms)), xticklabels=[f"{norm:g}" for norm in norms])
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("image AUROC")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("norm_occ_norms.png"), dpi=110)

    schedule = grouped(
        runs(sweeps / "norm_occ_schedule"),
        lambda c, r: (r["categories"][0], c["method"]["optimizer"]["lr"], c["trainer"]["max_steps"]),
    )
    steps = sorted({key[2] for key in schedule})
    print(
        "\n| category | learning rate | "
        + " | ".join(f"{n} steps" for n in steps)
        + " |\n|---|---|"
        + "---|" * len(steps)
    )
    for category, rate in sorted({key[:2] for key in schedule}):
        row = [schedule.get((category, rate, n), []) for n in steps]
        print(f"| {category} | {rate:g} | " + " | ".join(cell(values) if values else "–" for values in row) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
