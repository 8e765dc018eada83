"""The objective of a search: `validation.METRIC` is a metric of held-out training images. Imports nothing heavy."""

from typing import Any

from anomalib_lite.errors import UserError
from anomalib_lite.metrics.names import overlap_key


def check_objective(config: dict[str, Any]) -> None:
    """UserError for an AUPRO at a false positive rate where the run computes none; the schema checks other metrics."""
    name, limits = str(config["objective"]), config["scoring"]["fpr_limits"]
    choices = [f"validation.{overlap_key('aupro', limit)}" for limit in limits]
    if name.startswith("validation.aupro_") and name not in choices:
        raise UserError(
            f"objective={name}: no such metric; choose from {', '.join(choices)}; aupro_05 stands for the limit 0.05: "
            "another limit is added by scoring.fpr_limits"
        )


def objective(name: str | None, result: dict[str, Any]) -> float | None:
    """The value of `validation.METRIC` that an optimising sweeper gets; None if nothing was held out."""
    metrics = result["validation"]
    if name is None or metrics is None:
        return None
    metric = name.partition(".")[2]
    if metric not in metrics:
        choices = ", ".join(f"validation.{each}" for each in metrics)
        raise UserError(f"objective={name}: no such metric; choose from {choices}")
    return metrics[metric]
