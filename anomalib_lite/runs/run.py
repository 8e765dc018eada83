"""One run, from its resolved configuration to its results: build, fit, test, write."""

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import get_method, instantiate
from torch.utils.data import DataLoader

from anomalib_lite import __version__
from anomalib_lite.cli import schema as configuration
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError, enough_memory
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.precompute import FrozenFeatures
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.per_category import curves as make_curves
from anomalib_lite.runs import artifacts, summary
from anomalib_lite.runs import ranks as ranks_of
from anomalib_lite.runs.callbacks import Training
from anomalib_lite.runs.devices import lightning_options, peak_memory_mb
from anomalib_lite.runs.efficiency import efficiency
from anomalib_lite.runs.figures import training_figure, write_figures
from anomalib_lite.runs.terminal import silence_libraries
from anomalib_lite.runs.test_outputs import HELD_OUT, NORMAL, TEST, Evaluation
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
    silence_libraries()
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
    filling = FrozenFeatures(data, cfg.get("cache") or {"enabled": False}, cfg["hardware"]["feature_memory_gb"])
    epochs = cfg["trainer"]["max_epochs"]
    if type(model).training_step is AnomalyModule.training_step:
        epochs = 0  # a closed form has no batches to count
        if data.balanced:
            notes.append("data.balanced=true changes nothing: this method sees every training image once")
    limits = (cfg["trainer"]["max_steps"], None if epochs is None else epochs * len(data.train_dataloader()))
    model.total_steps = model.phases * min(steps for steps in limits if steps is not None)
    training, evaluating = Training(cfg, checkpoint, model.total_steps), Evaluation()
    data.batches_done = lambda: training.steps
    if ranks_of.is_first_on_node():
        for line in data.kept.told(names["split"]):
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
        with enough_memory(lambda: "data.batch_size" if training.started else "data.eval_batch_size", cfg):
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
    data.batches_done = None
    samples = {TEST: data.test_samples, NORMAL: data.train_samples, HELD_OUT: data.val_samples}
    outputs = evaluating.gather(samples, Path(data.root or "/"))
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
    measured, reasons = summary.measure(cfg["scoring"], data, outputs)
    result = {
        **summary.describe(cfg, names, data, model),
        **measured,
        "timing": timing,
        "efficiency": cost,
        "cache": filling.report,
        "environment": summary.environment(cfg, model, trainer.strategy.root_device),
        "notes": [*notes, *reasons, *remarks],
        "overrides": list(overrides),
    }
    test = outputs[TEST]
    curves = make_curves(test, data.has_masks)
    write(run, data, outputs, curves, result, model)
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


def write(
    run: Path,
    data: AnomalyDataModule,
    outputs: dict[int, dict[str, Any]],
    curves: dict[str, Any],
    result: dict[str, Any],
    model: AnomalyModule,
) -> None:
    """Scores, maps, curves and figures, and result.json last: it says that the run is finished."""
    test = outputs[TEST]
    artifacts.write_scores(run, test)
    artifacts.write_maps(run, test, curves, summary.normal_columns(outputs))
    title = f"{result['method']}, seed {result['seed']}"
    write_figures(run / "figures", data, test, result["thresholds"]["per_category"], title, model)
    training_figure(run / "figures", data, model)
    artifacts.write_result(run, result)
