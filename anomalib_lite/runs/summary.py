"""The content of result.json: what was run on which data, what was measured, and where."""

import contextlib
import functools
import platform
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_lite import __version__
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.pipeline import NORMALIZE
from anomalib_lite.features.backbones import has_bf16
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.functional import Metrics
from anomalib_lite.metrics.per_category import decisions, mean_metrics, measure_categories, ranking_notes, thresholds
from anomalib_lite.paths import HOME
from anomalib_lite.runs import own_modules
from anomalib_lite.runs.artifacts import SCHEMA
from anomalib_lite.runs.devices import device_name
from anomalib_lite.runs.saturation import add_spro
from anomalib_lite.runs.test_outputs import HELD_OUT, NORMAL, TEST

FEW = 50  # normal training images of a category: with fewer, a 0.99 quantile is little more than their maximum
TF32 = ", TF32 in training"
PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy", "albumentations", "hydra-core")


def describe(
    cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule, model: AnomalyModule
) -> dict[str, Any]:
    """What was run, on which data, under which protocol.

    Args:
        cfg: the resolved configuration. names: its choices of `method` and `split`.
    """
    default = [{"resize": list(data.test_size), "filter": cfg["data"]["resample"], "as": "PIL, antialiased"}]
    default = [] if data.test_size == "original" else default
    elsewhere = ("quantile", "fpr_limits", "map_size", "threshold_images")
    backbone = model.backbone
    norm = {"norm": True} if getattr(backbone, "norm", False) else {}
    return {
        "schema": SCHEMA,
        "method": names["method"],
        "variant": getattr(model, "variant", None),
        "dataset": data.name,
        "categories": data.categories,
        "setting": "single" if len(data.categories) == 1 else "unified",
        "split": {"name": names["split"]}
        | {key: value for key, value in cfg["split"].items() if not key.startswith("_")}
        | data.kept.describe(),
        "backbone": None if backbone is None else {"name": backbone.name, "layers": backbone.layers} | norm,
        "weights": None if backbone is None else Path(cfg["backbone"]["weights"]).name,
        "seed": cfg["seed"],
        "protocol": {
            "data": {
                "transform": cfg["data"]["transform"] or default,
                "map_size": model.map_size if isinstance(model.map_size, str) else list(model.map_size),
                "mask": "nearest, > 0",
                "fpr_limits": cfg["scoring"]["fpr_limits"],
                **other_normalisation(data),
            }
            | ({"value_range": data.value_range} if data.value_range else {})
            | ({"tiling": {"size": list(data.tiling.size), "overlap": data.tiling.overlap}} if data.tiling else {}),
            "scoring": {key: value for key, value in model.scoring.items() if key not in elsewhere}
            | {"weights": "last"},
        },
        "data": {
            "fingerprint": data.fingerprint,
            "train_counts": data.train_counts,
            "train_anomalous": sum(sample.label for sample in data.train_samples),
            "test_counts": data.test_counts,
        }
        | ({"full_fingerprint": data.full_fingerprint} if data.full_fingerprint else {})
        | ({"value_range": list(data.pixels.value_range)} if data.pixels.value_range else {}),
    }


def other_normalisation(data: AnomalyDataModule) -> dict[str, Any]:
    """The images' mean and standard deviation where they are neither ImageNet's nor none: such runs are set apart."""
    used = data.normalize
    if isinstance(used, str) or (tuple(used["mean"]), tuple(used["std"])) in NORMALIZE.values():
        return {}
    return {"normalize": used}


def measure(
    scoring: dict[str, Any], data: AnomalyDataModule, outputs: dict[int, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Metrics, validation, thresholds and decisions; the points of curves; notes on metrics that can't be computed.

    Args:
        scoring: the `scoring` group of the configuration. outputs: as `Evaluation.gather` returns them.
    """
    test, chosen = outputs[TEST], thresholds(normal_columns(outputs), scoring["quantile"])
    chosen |= drawn_from(chosen, data, outputs)
    at = scoring["fpr_limits"], chosen["per_category"]
    per_category, per_defect, curves, reasons = measure_categories(test, data.has_masks, *at)
    reasons += add_spro(per_category, per_defect, data, test, scoring["fpr_limits"])
    mean, partial_means = mean_metrics(per_category)
    groups: dict[str, Metrics] = {
        name: mean_metrics({category: per_category[category] for category in members})[0]
        for name, members in (("head", data.kept.head), ("tail", data.kept.tail))
        if members
    }
    decided = decisions(test, chosen["per_category"])
    flagged = {category: shares["good_flagged"] for category, shares in decided.items()}
    validation = None
    if data.val_samples:
        all_have_masks = dict.fromkeys(data.categories, True)
        validation = mean_metrics(measure_categories(outputs[HELD_OUT], all_have_masks, *at).per_category)[0]
    content = {
        "metrics": mean,
        "per_category": per_category,
        "groups": groups or None,
        "per_defect": per_defect,
        "validation": validation,
        "thresholds": chosen,
        "decisions": {"per_category": decided},
    }
    notes = [*ranking_notes(test, per_category, flagged), *reasons, *partial_means, *threshold_notes(chosen)]
    return content, curves, notes


def threshold_notes(chosen: dict[str, Any]) -> list[str]:
    """Notes on categories whose thresholds come from a part of the images, or from fewer than FEW: too few for a high
    quantile.
    """
    drawn = [
        f"{name} ({chosen['per_category'][name]['images']} of {n})" for name, n in chosen.get("drawn_from", {}).items()
    ]
    text = "scoring.threshold_images: the thresholds come from normal training images drawn by the seed: {}"
    notes = [text.format(", ".join(drawn))] if drawn else []
    few = {name: x["images"] for name, x in chosen["per_category"].items() if x["images"] < FEW}
    listed = ", ".join(f"{name} ({count})" for name, count in few.items())
    text = "the thresholds come from fewer than {} normal training images, so good images may often be flagged: {}"
    return [*notes, text.format(FEW, listed)] if few else notes


def drawn_from(
    chosen: dict[str, Any], data: AnomalyDataModule, outputs: dict[int, dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """`drawn_from`: of categories whose thresholds come from a part of the normal training images, the number of all;
    empty where there is no such category, and where the thresholds are those of a stored run.
    """
    if "paths" not in outputs[NORMAL]:
        return {}
    all_normal = Counter(sample.category for sample in data.train_samples if not sample.label)
    part = {name: all_normal[name] for name, x in chosen["per_category"].items() if x["images"] < all_normal[name]}
    return {"drawn_from": part} if part else {}


def normal_columns(outputs: dict[int, dict[str, Any]]) -> dict[str, np.ndarray]:
    """`scores`, `map_max`, `map_median`, `categories` and `held_out` of the normal training images and the held-out
    images, [N] each."""
    parts = []
    for loader in (NORMAL, HELD_OUT):
        if loader in outputs:
            columns = outputs[loader]
            good = (
                columns["labels"] == 0
            )  # a split may admit defective training images; some held-out ones are corrupted
            held_out = columns.get("held_out", np.full(len(good), loader == HELD_OUT))
            names = ("scores", "map_max", "map_median", "categories")
            parts.append({name: columns[name][good] for name in names} | {"held_out": held_out[good]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def environment(cfg: dict[str, Any], model: AnomalyModule, device: torch.device) -> dict[str, Any]:
    """Versions, device, git revision, the user's own modules, precision, and whether algorithms were deterministic."""
    own = own_modules.digests(cfg)
    where = {"device": device_name(device), "precision": precision(cfg["hardware"]["precision"], model, device)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    return software() | ({"modules": own} if own else {}) | where | {"deterministic": deterministic}


@functools.cache
def software() -> dict[str, str | None]:
    """Versions of the packages and the git revision, read once: they are those of the code that this process runs."""
    revision = None
    if (HOME / ".git").exists():  # the package's own checkout, not whatever repository a wheel was installed below
        revision = _git("rev-parse", "HEAD")
        revision += "+changes" if revision and _git("status", "--porcelain") else ""
    packages = {package: version(package) for package in PACKAGES}
    python = {"python": platform.python_version(), "anomalib_lite": __version__}
    return {**python, **packages, "git": revision or None}


def _git(*arguments: str) -> str:
    """What git prints; "" where it fails or is not installed."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return ""


def precision(wanted: str | int, model: AnomalyModule, device: torch.device) -> str:
    """What was computed in which type: it moves metrics by about 0.001, and differs between machines.

    Args:
        wanted: hardware.precision.
    """
    tf32 = TF32 if device.type == "cuda" and wanted != 32 and model.total_steps else ""
    if wanted == "bf16":
        return f"bf16{tf32}"
    low = {
        "frozen backbone": model.backbone is not None and model.backbone.low_precision(device),
        "the method's networks": model.autocasted and wanted == "auto" and has_bf16(device),
    }
    parts = " and ".join(part for part, is_low in low.items() if is_low)
    return (f"float32, {parts} in bf16" if parts else "float32") + tf32


def other_precision(before: str | None, now: str) -> list[str]:
    """A note if a run was tested in another precision than now: on another machine, or with another option.

    Args:
        before, now: what `precision` gave; None: not known.
    """
    tested, computing = ((text or now).removesuffix(TF32) for text in (before, now))
    if precision_kind(tested) == precision_kind(computing):
        return []
    return [f"the run was tested in {tested}, and this is {computing}: scores differ in their third or fourth digit"]


def precision_kind(text: str) -> str:
    """bf16, mixed or float32, of what `precision` gave: parts in bf16 may have run in training only."""
    return "bf16" if text.startswith("bf16") else "mixed" if "bf16" in text else "float32"
