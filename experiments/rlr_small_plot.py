"""Table and held-out losses of rlr_small's runs: python experiments/rlr_small_plot.py PICTURE.png DIR...

The table of the runs below the folders goes to the standard output, the plot to the picture.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("image_auroc", "pixel_auroc", "aupro_30")


def main() -> None:
    picture, *folders = map(Path, sys.argv[1:])
    runs = [file.parent for folder in folders for file in sorted(folder.rglob("result.json"))]
    results = {run: json.loads((run / "result.json").read_text()) for run in runs}
    categories = sorted({category for result in results.values() for category in result["categories"]})
    print(f"| method | batches | {' | '.join(categories)} | mean | training, testing (s) |")
    print("|---" * (len(categories) + 4) + "|")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}  # by method and seed
    for run, result in results.items():
        cells = [show(result["per_category"][category]) for category in categories] + [show(result["metrics"])]
        timing = result["timing"]
        times = f"{timing['fit_s']:.0f}, {timing['test_s']:.0f}"
        print(f"| {result['method']} | {timing['steps']} | {' | '.join(cells)} | {times} |")
        with (run / "metrics.csv").open(newline="") as file:
            rows = [(int(r["step"]), float(r["held_out_loss"])) for r in csv.DictReader(file) if r.get("held_out_loss")]
        if rows:
            curves.setdefault(result["method"], {})[f"seed {result['seed']}"] = rows

    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.4), layout="constrained", squeeze=False)
    for axis, (method, seeds) in zip(axes[0], curves.items(), strict=True):
        for label, rows in seeds.items():
            axis.plot(*zip(*rows, strict=True), lw=1.2, label=label)
        if len(seeds) > 1:
            axis.legend()
        axis.set(xlabel="batch", ylabel="loss on held-out training images", title=method, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=110)


def show(metrics: dict[str, float]) -> str:
    return " / ".join(f"{100 * metrics[name]:.1f}" for name in METRICS)


if __name__ == "__main__":
    main()
