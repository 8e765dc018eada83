"""One run, from its resolved configuration to its results: build, fit, test, write."""

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import get_method, instantiate
from torch.utils.data import DataLoader

from anomalib_lite import __version__
from anomalib_lite.cli import schema as configuration
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError, enough_memory
from anomalib_lite.features.backbones import Backbone, has_bf16
from anomalib_lite.features.precompute import FrozenFeatures
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import artifacts as results
from anomalib_lite.runs import test_outputs as evaluation
from anomalib_lite.runs.callbacks import Training, quiet
from anomalib_lite.runs.devices import device_name, lightning_options, peak_memory_mb
from anomalib_lite.runs.efficiency import efficiency
from anomalib_lite.runs.figures import write_figures, write_rows
from anomalib_lite.runs.visualize import of_test_images, of_training_images
from anomalib_lite.tracking.csv_logger import make_loggers
from anomalib_lite.tracking.wandb_logger import WandbRun

log = logging.getLogger(__name__)


def build(cfg: dict[str, Any], stored: bool = False) -> tuple[AnomalyDataModule, AnomalyModule, list[str]]:
    """The data, set up and checked, the method on its backbone, and notes. Seeds everything first.

    With `stored`, all weights will come from a checkpoint: the backbone's file or the hub is not asked.
    """
    L.seed_everything(cfg["seed"], workers=True, verbose=False)
    data = instantiate(cfg["data"], map_size=cfg["scoring"].get("map_size"))
    data.setup()
    notes = list(data.notes)
    backbone = make_backbone(cfg, **({"weights": "none"} if stored else {}))
    if backbone is not None and cfg["backbone"]["weights"] == "none":
        notes.append("the backbone's weights are random")
    model = make_method(cfg, backbone, data, data.categories)
    return data, model, notes


def make_backbone(cfg: dict[str, Any], **more: Any) -> Backbone | None:
    """The backbone, or None where there is none or the method has no use for it (as in a sweep over methods)."""
    if cfg["backbone"]["name"] is None or not getattr(_target(cfg), "uses_backbone", True):
        return None
    return instantiate(cfg["backbone"], precision=cfg["hardware"]["precision"], **more)


def _target(cfg: dict[str, Any]) -> Any:
    """The method's class; None for a wrong name, which is told where the method is made."""
    with contextlib.suppress(Exception):
        return get_method(cfg["method"]["_target_"])
    return None


def make_method(
    cfg: dict[str, Any], backbone: Backbone | None, data: AnomalyDataModule, categories: list[str]
) -> AnomalyModule:
    """The method, with what the base of all methods is told beside the `method` group."""
    context = {
        "image_size": data.image_size,
        "test_size": data.test_size,
        "categories": categories,
        "precision": cfg["hardware"]["precision"],
    }
    configuration.check_types("method", _target(cfg), cfg["method"])
    model = instantiate(cfg["method"], backbone=backbone, scoring=cfg["scoring"], **context, _convert_="all")
    if open_keys := [key for key, value in model.scoring.items() if value == "auto"]:
        raise UserError(f"scoring.{open_keys[0]}=auto: this method has none of its own; give a value")
    return model


def execute(
    cfg: dict[str, Any],
    run: Path,
    names: dict[str, str],
    checkpoint: Path,
    overrides: Sequence[str],
    remarks: Sequence[str] = (),
    fit: bool = True,
    multirun: bool = False,
) -> dict[str, Any] | None:
    """Fit (from `checkpoint` on, if that file is there) or load it, test, and write what a run leaves into `run`.

    Args:
        cfg: the resolved `train` configuration. names: its choices of `method` and `split`.
        overrides: the command line, for result.json. remarks: further notes for it.

    Returns:
        result.json's content on rank 0, None on others.
    """
    quiet()
    hardware = lightning_options(cfg["hardware"], multirun)
    ranks = hardware["devices"] * hardware["num_nodes"]
    if fit and cfg["data"]["batch_size"] % ranks:
        raise UserError(
            f"data.batch_size={cfg['data']['batch_size']} can't be shared out to {ranks} devices evenly; "
            f"give a multiple of {ranks}"
        )
    stored = read_checkpoint(checkpoint) if checkpoint.is_file() else {}
    data, model, notes = build(cfg, bool(stored))
    if stored and stored["fingerprint"] != data.fingerprint:
        listed = f" (split.path={cfg['split']['path']} may have changed)" if cfg["split"].get("path") else ""
        raise UserError(
            f"data.root={data.root}: not the files that {checkpoint} was trained and tested on{listed}; train anew"
        )
    training, evaluating = Training(cfg, checkpoint, data), evaluation.Evaluation(ragged=model.map_size == "original")
    filling = FrozenFeatures(data, cfg.get("cache") or {"enabled": False}, cfg["hardware"]["feature_memory_gb"])
    epochs = cfg["trainer"]["max_epochs"]
    if type(model).training_step is AnomalyModule.training_step:
        epochs = training.max_epochs = 0  # a closed form has no batches to count
        if data.balanced:
            notes.append("data.balanced=true changes nothing: this method sees every training image once")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for line in data.kept.summary_lines(names["split"]):
            log.info(line)
    trainer = L.Trainer(
        **hardware,
        max_epochs=-1 if epochs is None else epochs * model.phases,
        logger=make_loggers(cfg["logger"], run) if fit else False,
        callbacks=[training, filling, evaluating],
        deterministic="warn",
        default_root_dir=run,
        limit_val_batches=0,
        use_distributed_sampler=False,  # the DataModule deals the samples out to the ranks itself, without padding
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    shown = [logger for logger in trainer.loggers if isinstance(logger, WandbRun) and trainer.is_global_zero]
    for logger in shown:
        logger.start(cfg, names, data)
    fit = fit and not stored.get("finished", False)  # a run that was interrupted while testing is trained already
    if fit:
        with enough_memory(lambda: "data.batch_size" if training.begun else "data.eval_batch_size", cfg):
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint if stored else None, weights_only=True)
        training.save(trainer)
    tested = time.perf_counter()
    data.trainer = trainer
    loaders = [data.test_dataloader(), data.normal_dataloader(sharded=True), data.val_dataloader()]
    with enough_memory(lambda: "data.eval_batch_size", cfg):
        trainer.test(
            model,
            [loader for loader in loaders if isinstance(loader, DataLoader)],  # also one without a batch for this rank
            ckpt_path=None if fit else checkpoint,
            weights_only=True,
            verbose=False,
        )
    evaluating.gather()
    if not trainer.is_global_zero:
        return None
    test_s = time.perf_counter() - tested
    cost, speed = efficiency(model, data, cfg["data"]["eval_batch_size"])
    timing = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "fit_s": training.fit_s,
        "steps": training.steps,
        "test_s": test_s,
        **speed,
        "peak_memory_mb": peak_memory_mb(),
    }
    result = {
        **describe(cfg, names, data, model),
        **measure(cfg, data, evaluating.arrays),
        "timing": timing,
        "efficiency": cost,
        "cache": filling.report,
        "environment": results.environment(device_name(trainer.strategy.root_device))
        | {"precision": precision(cfg, model, trainer.strategy.root_device)},
    }
    result["notes"] = [*notes, *result["notes"], *remarks]
    result["overrides"] = list(overrides)
    test = evaluating.arrays[evaluation.TEST]
    curves = evaluation.curves(data.test_samples, data.categories, test, data.has_masks)
    write(run, data, evaluating.arrays, curves, result, model)
    for logger in shown:
        logger.log_test(result, data, test, curves)
    return result


def load(checkpoint: Path, cfg: dict[str, Any], device: str) -> tuple[AnomalyModule, AnomalyDataModule]:
    """A run's method with its trained weights, in evaluation mode, and its DataModule without its data."""
    stored = read_checkpoint(checkpoint)
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device=gpu: no GPU is visible here; choose device=cpu or device=auto")
    options = lightning_options(cfg["hardware"] | {"accelerator": device, "devices": 1, "nodes": 1}, multirun=False)
    data = instantiate(cfg["data"], category=stored["categories"])
    backbone = make_backbone(cfg, weights="none")  # the checkpoint holds its weights too
    model = make_method(cfg, backbone, data, stored["categories"])
    try:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: damaged, or not of the method that {cfg['method']['_target_']} is now"
        ) from error
    return model.eval().to("cuda" if options["accelerator"] == "gpu" else "cpu"), data


def precision(cfg: dict[str, Any], model: AnomalyModule, device: torch.device) -> str:
    """What was computed in which type: it moves metrics by about 0.001, and differs between machines."""
    if cfg["hardware"]["precision"] == "bf16":
        return "bf16"
    low = {
        "frozen backbone": model.backbone is not None and model.backbone.low_precision(device),
        "the method's networks": model.autocasts and cfg["hardware"]["precision"] == "auto" and has_bf16(device),
    }
    parts = " and ".join(part for part, is_low in low.items() if is_low)
    return f"float32, {parts} in bf16" if parts else "float32"


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a run writes into its checkpoint beside Lightning's part: version, config, fingerprint, finished."""
    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["anomalib_lite"]
    except Exception as error:
        raise UserError(f"{checkpoint}: damaged, or not a checkpoint of ours; remove it and train again") from error
    if stored["version"].split(".")[:2] != __version__.split(".")[:2]:
        raise UserError(
            f"{checkpoint}: written by anomalib_lite {stored['version']}, this is {__version__}; train again"
        )
    return stored


def describe(
    cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule, model: AnomalyModule
) -> dict[str, Any]:
    """What was run, on which data, under which protocol."""
    default = [{"resize": list(data.test_size), "filter": cfg["data"]["resample"], "as": "PIL, antialiased"}]
    default = [] if data.test_size == "original" else default
    apart = ("quantile", "fpr_limits", "map_size")
    scoring = {key: value for key, value in model.scoring.items() if key not in apart}
    backbone = model.backbone
    return {
        "schema": results.SCHEMA,
        "method": names["method"],
        "variant": getattr(model, "variant", None),
        "dataset": data.name,
        "categories": data.categories,
        "setting": "single" if len(data.categories) == 1 else "unified",
        "split": {"name": names["split"]}
        | {k: v for k, v in cfg["split"].items() if not k.startswith("_")}
        | data.kept.describe(),
        "backbone": None if backbone is None else {"name": backbone.name, "layers": backbone.layers},
        "weights": None if backbone is None else Path(cfg["backbone"]["weights"]).name,
        "seed": cfg["seed"],
        "protocol": {
            "data": {
                "transform": cfg["data"]["transform"] or default,
                "map_size": model.map_size if isinstance(model.map_size, str) else list(model.map_size),
                "mask": "nearest, > 0",
                "fpr_limits": cfg["scoring"]["fpr_limits"],
            },
            "scoring": scoring | {"weights": "last"},
        },
        "data": {
            "fingerprint": data.fingerprint,
            "train_counts": data.train_counts,
            "train_anomalous": sum(sample.label for sample in data.train_samples),
            "test_counts": data.test_counts,
        },
    }


def measure(cfg: dict[str, Any], data: AnomalyDataModule, arrays: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Metrics, validation and thresholds from the gathered maps and scores, with notes on what can't be computed."""
    names, scoring = data.categories, cfg["scoring"]

    def metrics(part, samples, has_masks):
        per_category, missing = evaluation.category_metrics(
            samples, names, arrays[part], has_masks, scoring["fpr_limits"]
        )
        mean, partial = evaluation.mean_metrics(per_category)
        return per_category, mean, missing + partial

    per_category, mean, notes = metrics(evaluation.TEST, data.test_samples, data.has_masks)
    groups = {
        name: evaluation.mean_metrics({category: per_category[category] for category in members})[0]
        for name, members in (("head", data.kept.head), ("tail", data.kept.tail))
        if members
    }
    validation = None
    if data.val_samples:
        validation = metrics(evaluation.HELD_OUT, data.val_samples, dict.fromkeys(names, True))[1]
    per_defect = evaluation.defect_metrics(
        data.test_samples, names, arrays[evaluation.TEST], data.has_masks, scoring["fpr_limits"]
    )
    limits = evaluation.thresholds(normal_scores(data, arrays), scoring["quantile"])
    told = evaluation.decisions(data.test_samples, arrays[evaluation.TEST], limits["per_category"])
    return {
        "metrics": mean,
        "per_category": per_category,
        "groups": groups or None,
        "per_defect": per_defect,
        "validation": validation,
        "thresholds": limits,
        "decisions": {"per_category": told},
        "notes": notes,
    }


def normal_scores(data: AnomalyDataModule, arrays: dict[int, dict[str, Any]]) -> dict[str, np.ndarray]:
    """`scores`, `peaks`, `medians` and `categories` of the normal training images, [N] each."""
    normal = arrays[evaluation.NORMAL]
    good = normal["labels"] == 0
    categories = np.array([sample.category for sample in data.train_samples])
    return {key: normal[key][good] for key in ("scores", "peaks", "medians")} | {"categories": categories[good]}


def write(
    run: Path,
    data: AnomalyDataModule,
    arrays: dict[int, dict[str, Any]],
    curves: dict[str, np.ndarray],
    result: dict[str, Any],
    model: AnomalyModule,
) -> None:
    """Scores, maps, curves and figures of the test set, of a few training images what the method shows of them, and
    result.json last: it says that the run is finished.
    """
    assert data.root is not None
    test, root = arrays[evaluation.TEST], Path(data.root)
    results.write_scores(run, root, data.test_samples, test["scores"])
    normal = {f"normal/{key}": value for key, value in normal_scores(data, arrays).items()}
    results.write_maps(run, root, data.test_samples, test["maps"], curves | normal)
    title = f"{result['method']}, seed {result['seed']}"
    show = partial(of_test_images, model, data)
    write_figures(run / "figures", data.test_samples, data.categories, test, result["thresholds"], title, show)
    if rows := of_training_images(model, data):
        write_rows(run / "figures" / "training.png", rows)
    results.write_result(run, result)
