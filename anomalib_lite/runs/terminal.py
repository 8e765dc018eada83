"""What a run prints in the terminal: the table of metrics and a few lines; and which messages of libraries it hides."""

import logging
import warnings
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from anomalib_lite.console import make_console
from anomalib_lite.metrics.names import name_of
from anomalib_lite.runs import folder

BELOW = ("aupimo", "pixel_iou", "pixel_dice")  # metrics in a line below the table, which is wide enough
#: messages about what is intended here
EXPECTED_WARNINGS = (
    r".*have no `validation_step`.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*module\(s\) in eval mode.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*configure_optimizers` returned `None`.*",
    r".*trying to infer the `batch_size`.*",
    r".*resuming from a checkpoint that ended before the epoch.*",  # the training loader goes on within an epoch
    r".*Using `DistributedSampler` with the dataloaders.*",
    r".*`Trainer\(barebones=True\)`.*",
    r".*overridden `transfer_batch_to_device`.*",  # it leaves masks on the host
    r".*`broadcast_buffers` is deprecated.*",  # its successor is not in all versions of PyTorch
    r"Grad strides do not match bucket view strides.*",  # of 1×1 convolutions, once
    r".*one pass will not be enough.*",
    r"Total length of `\w+` across ranks is zero.*",  # no test images: a note of the result says so
)


def silence_libraries() -> None:
    """Hide the messages of Lightning and timm about what is intended here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists a file's missing tensors; features/ checks them
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def metrics_table(result: dict[str, Any]) -> Table:
    """The metrics per category and their mean, in percent."""
    title = f"{result['method']} on {result['dataset']} ({result['setting']}), seed {result['seed']}, in percent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("\ncategory", overflow="fold")
    keys = [key for key in result["metrics"] if key not in BELOW]
    for key in keys:
        table.add_column(name_of(key).replace(" ", "\n"), justify="right", no_wrap=True)
    rows = list(result["per_category"].items())
    means = [(f"{name} mean", metrics) for name, metrics in (result["groups"] or {}).items()]
    means += [("mean", result["metrics"])] * (len(rows) > 1)
    for part in (rows, means):
        for name, metrics in part:
            table.add_row(name, *("–" if metrics[key] is None else f"{100 * metrics[key]:.1f}" for key in keys))
        table.add_section()
    return table


def summary_lines(run: Path, result: dict[str, Any]) -> list[str]:
    """Held-out metrics, costs, times, decisions, and where the files are."""
    lines = []
    further = [
        f"{name_of(key)} {100 * value:.1f}" for key in BELOW if (value := result["metrics"].get(key)) is not None
    ]
    if further:
        lines.append(f"{', '.join(further)} (IoU and Dice at the pixel threshold)")
    if result["validation"]:
        values = [f"{key} {100 * value:.1f}" for key, value in result["validation"].items() if value is not None]
        lines.append(f"held-out training images: {', '.join(values)}")
    timing, cost = result["timing"], result["efficiency"]
    parts = [f"{cost['parameters'] / 1e6:.1f} M parameters ({cost['trainable'] / 1e6:.1f} M trained)"]
    if cost["flops_per_image"] is not None:
        parts.append(f"{cost['flops_per_image'] / 1e9:.1f} GFLOP per image")
    if timing["latency_ms"] is not None:
        beside = timing.get("beside") or {"jobs": 0}
        other = f" (beside other work on {beside['busy_cores']:.1f} cores)" if beside["jobs"] else ""
        parts.append(f"latency {timing['latency_ms']:.0f} ms{other}")
    if timing["images_per_s"] is not None:
        parts.append(f"{timing['images_per_s']:.0f} images/s at batch {timing['batch_size']}")
    parts.append(f"peak memory {max(timing['peak_memory_mb'].values()) / 1024:.1f} GiB")
    lines.append(", ".join(parts))
    lines.append(f"trained {timing['steps']} steps in {timing['fit_s']:.1f} s, tested in {timing['test_s']:.1f} s")
    lines += decision_lines(result)
    names = (folder.RESULT, folder.SCORES, folder.MAPS, folder.METRICS_LOG, folder.FIGURES, folder.CHECKPOINTS)
    lines.append(f"{run}/ holds {', '.join(name for name in names if (run / name).exists())}")
    return lines


def decision_lines(result: dict[str, Any]) -> list[str]:
    """How many test images of each category are called defective: a rounded share of 249 of 250 images is 100 %."""
    lines = []
    threshold = f"at the threshold ({result['thresholds']['quantile']:g} quantile of {result['thresholds']['from']})"
    for category, found in result["decisions"]["per_category"].items():
        count = result["data"]["test_counts"][category]
        named = (
            (found["defective_found"], count["defective"], "defective images found"),
            (found["good_flagged"], count["good"], "good ones flagged"),
        )
        counts = ", ".join(f"{round(share * n)} of {n} {what}" for share, n, what in named if share is not None)
        if counts:
            lines.append(f"{category}: {threshold} {counts}")
    return lines


def show(run: Path, result: dict[str, Any]) -> None:
    """Print the table, the notes, and the lines below them."""
    console = make_console()
    console.print(metrics_table(result))
    for note in result["notes"]:
        console.print(f"note: {note}", style="dim", soft_wrap=True)
    for line in summary_lines(run, result):
        console.print(line, soft_wrap=True)
