"""A trained run on the labelled test images of another folder, with the thresholds that the run has."""

from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError
from anomalib_lite.runs import artifacts, build
from anomalib_lite.runs.test_outputs import NORMAL

FREE = ("scoring.fpr_limits", "scoring.quantile")  # they change no score: the run's thresholds follow from its scores


def read(cfg: dict[str, Any], stored: dict[str, Any]) -> tuple[AnomalyDataModule, bool]:
    """The data below data.root, and whether they are not the run's own but another test set.

    Args:
        cfg: the configuration of the evaluation. stored: what the run's checkpoint holds.

    Raises:
        UserError: the images can't be read, or the scores are computed otherwise than the run's thresholds.
    """
    try:
        data = build.make_data(cfg, stored)
        if data.fingerprint == stored["fingerprint"]:
            return data, False
    except UserError:  # such as no training images, which are not needed here
        pass
    trained = stored["config"]["scoring"]
    for key, value in cfg["scoring"].items():
        if value != trained.get(key) and f"scoring.{key}" not in FREE:
            raise UserError(
                f"scoring.{key}={value}: another test set has the thresholds of the run, which were found with "
                f"{trained.get(key)}; leave the key out, or evaluate the run's own data"
            )
    return build.make_test_set(cfg, stored), True


def normal_outputs(run: Path) -> dict[int, dict[str, Any]]:
    """What `Evaluation.gather` gives of the run's normal training images, as its maps.npz has them."""
    columns = artifacts.read_normal(run)
    return {NORMAL: columns | {"labels": np.zeros(len(columns["scores"]), np.int64)}}


def mark(result: dict[str, Any], data: AnomalyDataModule, run: Path) -> None:
    """Say in a result that it is of another test set. Its name is a part of the data set's, so no table mixes both."""
    first = artifacts.read_result(run)
    result["test_set"] = {"root": str(data.root), "of": first["dataset"]}
    result["dataset"] = f"{first['dataset']}, test set {Path(str(data.root)).name}"
    result["split"] = first["split"]
    for key in ("train_counts", "train_anomalous"):
        result["data"][key] = first["data"][key]
    result["notes"].append(f"another test set than the run's: {data.root}; the thresholds are the run's")
