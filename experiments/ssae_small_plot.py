"""Tables and plot of the autoencoder's study from its runs: python experiments/ssae_small_plot.py SMALL ABLATION.

SMALL and ABLATION are folders that hold the sweeps of ssae_small.md. Writes ssae_small.png beside this file and prints
the tables.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

METRICS = ("image_auroc", "pixel_auroc", "aupro_30")


def runs(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(configuration, result) of every finished run below a folder."""
    return [
        (json.loads((file.parent / "checkpoints" / "config.json").read_text())["config"], json.loads(file.read_text()))
        for file in sorted(folder.rglob("result.json"))
    ]


def variant(cfg: dict[str, Any]) -> str:
    """What differs from the recipe."""
    contents, method = cfg["data"]["corrupt"]["contents"], cfg["method"]
    if contents:
        return f"only {', '.join(contents)}"
    if method["skip"] != "ccm":
        return f"skip {method['skip']}"
    return "recipe" if method["corrupted_weight"] == 0.9 else f"λ = {method['corrupted_weight']}"


def table(rows: dict[str, dict[str, list[float]]]) -> None:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, cells in rows.items():
        shown = (" / ".join(f"{100 * x:.1f}" for x in cells[c]) if c in cells else "–" for c in columns)
        print(f"| {name} | " + " | ".join(shown) + " |")


def main(small: Path, ablation: Path) -> None:
    rows: dict[str, dict[str, list[float]]] = {}
    for cfg, result in runs(small):
        values = [result["metrics"][key] for key in METRICS]
        rows[result["categories"][0]] = {"image AUROC / pixel AUROC / AUPRO@0.3": values}
        print(f"{result['categories'][0]}: {cfg['trainer']['max_steps']} steps, {result['timing']['fit_s']:.0f} s")
    table(rows)
    parts: dict[str, dict[str, list[float]]] = {}
    for cfg, result in runs(ablation):
        parts.setdefault(variant(cfg), {})[result["categories"][0]] = [result["metrics"][key] for key in METRICS]
    table(parts)
    categories = list(dict.fromkeys(category for cells in parts.values() for category in cells))
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.3 * len(parts) + 1.2), sharey=True)
    for number, (axis, key) in enumerate(zip(axes, METRICS, strict=False)):
        for category, marker in zip(categories, "os^Dv", strict=False):
            places = [i for i, cells in enumerate(parts.values()) if category in cells]
            values = [cells[category][number] for cells in parts.values() if category in cells]
            axis.plot(values, places, marker, label=category)
        axis.set(title=key.replace("_", " ").replace("auroc", "AUROC"), yticks=range(len(parts)), yticklabels=parts)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix("").with_name("ssae_small.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
