"""What W&B shows of a run: its name, group and tags; the results as numbers, tables, charts and pictures.

Imported only when a run starts in W&B: WandbRun sets W&B's folders before wandb is imported.
"""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from yaml import YAMLError

from anomalib_lite.cli.hydra_hooks import SWEEP_RECORD
from anomalib_lite.cli.keys import short_key
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.splits import SHOTS
from anomalib_lite.metrics.curves import CURVES
from anomalib_lite.paths import relative_path
from anomalib_lite.runs.decisions import score_text
from anomalib_lite.runs.heat_maps import chosen_cases, overlay


def run_name(cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> str:
    """`norm_occ bottle seed 0`, `norm_occ mvtec unified exp20 seed 0`; in a sweep `norm_occ (norm=0.1) bottle seed 0`;
    with few shots `norm_occ bottle 4 shots split.seed 1 seed 0`.

    The parentheses hold what else differs between the jobs of the sweep, as in the labels of `compare`.
    """
    what = data.categories if len(data.categories) == 1 else [data.name, "unified"]
    split = [] if names["split"] == "full" else [split_name(cfg, names)]
    named = {"method", "seed", "split", "data.category" if len(data.categories) == 1 else "data"}
    if names["split"] == SHOTS:
        split.append(f"split.seed {cfg['split']['seed']}")
        named |= {"split.shots", "split.seed"}
    differ = {key: value for key, value in swept_values().items() if key not in named}
    details = ", ".join(f"{short_key(key, list(differ))}={value}" for key, value in differ.items())
    return " ".join([names["method"], *[f"({details})"] * bool(details), *what, *split, f"seed {cfg['seed']}"])


def tags(cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> list[str]:
    """Method, data set, setting, split and backbone; W&B accepts at most 64 characters per tag."""
    setting = "single" if len(data.categories) == 1 else "unified"
    found = (names["method"], data.name, setting, split_name(cfg, names), cfg["backbone"]["name"])
    return [str(tag)[:64] for tag in dict.fromkeys(found) if tag]


def split_name(cfg: dict[str, Any], names: dict[str, str]) -> str:
    """The choice of `split`; of few shots, their number."""
    return f"{cfg['split']['shots']} shots" if names["split"] == SHOTS else names["split"]


def swept_values() -> dict[str, str]:
    """The values that this job of a sweep has for the keys in which the jobs differ, as text without quotes."""
    if sweep_name() is None:
        return {}
    hydra = HydraConfig.get()
    try:
        sweep: Any = OmegaConf.to_container(OmegaConf.load(Path(hydra.sweep.dir) / SWEEP_RECORD), resolve=False)
        parameters = sweep["hydra"]["sweeper"].get("params") or {}
        given = [*(f"{key}={value}" for key, value in parameters.items()), *sweep["hydra"]["overrides"]["task"]]
        parsed = OverridesParser.create().parse_overrides(given)
    except (OSError, KeyError, TypeError, AttributeError, YAMLError, HydraException):  # written by another version
        return {}
    keys = [override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()]
    typed: Any = OmegaConf.to_container(hydra.overrides.task)
    pairs = (str(override).lstrip("+").partition("=") for override in typed)
    return {key: re.sub("[\"']", "", value) for key, _, value in pairs if key in keys}


def sweep_name() -> str | None:
    """The name of the folder of the sweep that this run is a job of."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    is_job = hydra.mode == RunMode.MULTIRUN or not OmegaConf.is_missing(hydra.job, "num")
    return Path(hydra.sweep.dir).name if is_job else None


def metrics(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """`metrics` and, with held-out images, `validation`; without the metrics that can't be computed."""
    found = {
        group: {key: value for key, value in (result[group] or {}).items() if value is not None}
        for group in ("metrics", "validation")
    }
    return {group: values for group, values in found.items() if values}


def details(result: dict[str, Any]) -> dict[str, Any]:
    """What the summary holds beside the metrics."""
    keys = ("groups", "timing", "efficiency", "thresholds", "decisions", "cache", "variant", "data")
    return {key: result[key] for key in keys} | {"notes": "\n".join(result["notes"])}


def tables(result: dict[str, Any], data: AnomalyDataModule, test: dict[str, Any]) -> dict[str, Any]:
    """Tables `per_category` and `per_defect` of the metrics, and `scores` with one row per test image."""
    decisions = result["decisions"]["per_category"]
    rows = {
        "per_category": [
            {"category": category} | values | decisions.get(category, {})
            for category, values in result["per_category"].items()
        ],
        "per_defect": [
            {"category": category, "defect": defect} | values
            for category, defects in result["per_defect"].items()
            for defect, values in defects.items()
        ],
        "scores": [
            {"path": relative_path(sample.path, data.root), "category": sample.category, "defect": sample.defect}
            | {"label": sample.label, "score": float(score)}
            for sample, score in zip(data.test_samples, test["scores"], strict=True)
        ],
    }
    made = {}
    for name, records in rows.items():
        columns = list(dict.fromkeys(key for record in records for key in record))
        if records:
            made[name] = wandb.Table(columns, [[record.get(key) for key in columns] for record in records])
    return made


def charts(categories: list[str], curves: dict[str, np.ndarray]) -> dict[str, Any]:
    """One chart per curve with one line per category, under `curves/image_roc` and so on."""
    made = {}
    for title, (x, y, x_name, y_name, _) in CURVES.items():
        having = [category for category in categories if len(curves.get(f"{category}/{y}", ()))]
        if having:
            xs, ys = ([curves[f"{category}/{axis}"].tolist() for category in having] for axis in (x, y))
            made[f"curves/{title.lower().replace(' ', '_')}"] = wandb.plot.line_series(
                xs, ys, keys=having, title=f"{title}: {y_name}", xname=x_name
            )
    return made


def pictures(result: dict[str, Any], data: AnomalyDataModule, test: dict[str, Any]) -> dict[str, Any]:
    """The best and worst cases of each category, under `cases/<category>`."""
    made = {}
    for category in data.categories:
        rows = [i for i, sample in enumerate(data.test_samples) if sample.category == category]
        threshold = result["thresholds"]["per_category"].get(category)
        if rows and threshold is not None:
            made[f"cases/{category}"] = [
                _picture(i, kind, threshold, data, test) for kind, i in chosen_cases(rows, test)
            ]
    return made


def _picture(i: int, kind: str, threshold: dict[str, float], data: AnomalyDataModule, test: dict[str, Any]) -> Any:
    """Test image i and its heat map side by side; masks that W&B can switch on lie over both."""
    sample, size = data.test_samples[i], data.image_size[::-1]  # width, height
    image = cv2.resize(data.eval_pipeline.shown(sample.path), size, interpolation=cv2.INTER_AREA)
    amap = cv2.resize(test["maps"][i], size, interpolation=cv2.INTER_LINEAR)

    def mask(inside: np.ndarray, number: int, label: str) -> dict[str, Any]:
        resized = cv2.resize(inside.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        return {"mask_data": number * np.tile(resized, 2), "class_labels": {number: label}}

    masks = {"prediction": mask(test["maps"][i] > threshold["pixel"], 2, "above the threshold")}
    if data.has_masks[sample.category]:
        masks["ground_truth"] = mask(test["masks"][i], 1, "defect")
    score = score_text(float(test["scores"][i]), threshold["image"])
    what = kind if sample.defect == "good" else f"{kind}: {sample.defect}"
    caption = f"{what}, {score}, {relative_path(sample.path, data.root)}"
    return wandb.Image(np.hstack([image, overlay(image, amap, threshold)]), caption=caption, masks=masks)
