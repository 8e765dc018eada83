"""Table and loss curves of the runs below the given folders: python experiments/recontrast_small_plot.py DIR...

The table goes to the standard output, the plot to experiments/recontrast_small.png.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = ("image_auroc", "pixel_auroc", "aupro_30")


def main() -> None:
    runs = [file.parent for folder in sys.argv[1:] for file in sorted(Path(folder).rglob("result.json"))]
    metrics: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    curves: dict[tuple[str, ...], list[list[tuple[int, float]]]] = defaultdict(list)
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        config = json.loads((run / "checkpoints" / "config.json").read_text())["config"]
        how = (config["method"]["encoder_bn"], str(config["hardware"]["precision"]))
        several = result["setting"] == "unified"
        for category, found in result["per_category"].items():
            metrics[(category, "one model for all" if several else "one class", *how)].append(found)
        with (run / "metrics.csv").open(newline="") as file:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["loss"]]
        curves[("+".join(result["categories"]), *how)].append(rows)

    print("| category | model | E_t's batch norm | precision | seeds | image AUROC | pixel AUROC | AUPRO@0.3 |")
    print("|---|---|---|---|---|---|---|---|")
    for key, found in sorted(metrics.items()):
        cells = [show([x[name] for x in found]) for name in METRICS]
        print(f"| {' | '.join(key)} | {len(found)} | {' | '.join(cells)} |")

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (key, several_runs) in enumerate(sorted(curves.items())):
        for j, rows in enumerate(several_runs):
            steps, losses = zip(*rows, strict=True)
            axes.plot(steps, losses, color=f"C{i}", lw=1, label=", ".join(key) if j == 0 else None)
    axes.set(xlabel="batch", ylabel="loss", title="ReContrast, resnet18, batches of 16")
    axes.legend(fontsize=7)
    figure.savefig(Path(__file__).with_suffix("").with_name("recontrast_small.png"), dpi=110)


def show(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
