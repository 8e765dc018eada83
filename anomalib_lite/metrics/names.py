"""The keys of metrics, as results store them and as people read them. Imports nothing heavy."""

from decimal import Decimal

OVERLAPS = {"aupro": "AUPRO", "spro": "sPRO"}  # metrics with a limit of the false positive rate
HEADINGS = {"auroc": "AUROC", "ap": "AP", "f1max": "F1-max", "iou": "IoU", "dice": "Dice"}


def overlap_key(metric: str, limit: float) -> str:
    """The key of aupro or spro at a limit in (0, 1], another one for every limit: the limit's digits behind the point,
    at least two. `aupro_30` is 0.3, `aupro_05` is 0.05, `aupro_055` is 0.055, and `aupro_100` is 1.
    """
    digits = f"{Decimal(str(limit)):f}".partition(".")[2].rstrip("0")
    return f"{metric}_{digits.ljust(2, '0')}" if digits else f"{metric}_100"


def name_of(metric: str) -> str:
    """image_auroc is image AUROC, aupro_30 is AUPRO @0.3, aupimo is AUPIMO; an unknown key stays as it is."""
    level, _, name = metric.partition("_")
    if level in OVERLAPS and name.isdecimal():
        return f"{OVERLAPS[level]} @{'1' if name == '100' else '0.' + name.rstrip('0')}"
    if metric == "aupimo":
        return "AUPIMO"
    return f"{level} {HEADINGS[name]}" if name in HEADINGS else metric
