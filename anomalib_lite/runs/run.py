"""One run as a list: data, method, trainer, features, fit, test, write."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.sampler import check_batch_size
from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError, enough_memory
from anomalib_lite.features.precompute import precompute
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.per_category import curves as make_curves
from anomalib_lite.runs import artifacts, build, folder, summary
from anomalib_lite.runs.callbacks import Training
from anomalib_lite.runs.devices import lightning_options, peak_memory_mb
from anomalib_lite.runs.efficiency import efficiency
from anomalib_lite.runs.figures import training_figure, write_figures
from anomalib_lite.runs.folder import read_checkpoint
from anomalib_lite.runs.run_logger import RunLogger
from anomalib_lite.runs.terminal import silence_libraries
from anomalib_lite.runs.test_outputs import HELD_OUT, NORMAL, TEST, Evaluation

log = logging.getLogger(__name__)


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
    """Fit (from `checkpoint` on, if that file exists) or load it, test, and write the results into the folder `run`.

    Args:
        cfg: the resolved `train` configuration. names: its choices of `method` and `split`.
        overrides: the command line, for result.json. remarks: further notes for it.
        multirun: whether further runs follow in this process.

    Returns:
        result.json's content on rank 0, None on other ranks.
    """
    silence_libraries()
    hardware = lightning_options(cfg["hardware"], multirun)
    if fit:
        check_batch_size(cfg["data"]["batch_size"], hardware["devices"] * hardware["num_nodes"])
    stored = read_checkpoint(checkpoint) if checkpoint.is_file() else {}
    L.seed_everything(cfg["seed"], workers=True, verbose=False)

    data = build.make_data(cfg, stored)
    check_fingerprint(cfg, data, stored, checkpoint)
    steps = build.budget(cfg, data)
    model = build.make_method(cfg, build.make_backbone(cfg, stored=bool(stored)), data, data.categories, steps)
    if stored:
        build.load_weights(model, checkpoint)  # features are computed with the checkpoint's backbone

    training, evaluation = Training(cfg, checkpoint, model.total_steps), Evaluation()
    loggers = build.make_loggers(cfg["logger"], run) if fit else []
    trainer = build.make_trainer(hardware, run, [training, evaluation], loggers, model.total_steps)
    if trainer.is_global_zero:
        announce(cfg, names, data, loggers)

    with build.all_ranks(trainer):
        fit = fit and not stored.get("finished", False)  # a run that was interrupted in its test is trained already
        cache: dict[str, Any] = {"used": False}
        if model.frozen_features:
            with enough_memory(lambda: "data.eval_batch_size", cfg):
                data, cache = with_features(cfg, trainer, data, model, fit)
        if fit:
            with enough_memory(lambda: "data.batch_size" if training.started else "data.eval_batch_size", cfg):
                trainer.fit(model, datamodule=data, ckpt_path=checkpoint if stored else None, weights_only=True)
            training.save(trainer)
        started = time.perf_counter()
        with enough_memory(lambda: "data.eval_batch_size", cfg):
            weights = None if fit else checkpoint
            trainer.test(model, test_loaders(data), ckpt_path=weights, weights_only=True, verbose=False)
        outputs = evaluation.gather(samples_of(data), Path(data.root or "/"))
    if not trainer.is_global_zero:
        return None

    timing = {"fit_s": training.fit_s, "steps": training.steps, "test_s": time.perf_counter() - started}
    result = result_of(cfg, names, data, model, outputs, timing, trainer.strategy.root_device)
    result |= {"cache": cache, "overrides": list(overrides)}
    result["notes"] = [*notes_of(cfg, data, model), *result["notes"], *remarks]
    curves = make_curves(outputs[TEST], data.has_masks)
    write(run, data, outputs, curves, result, model)
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.log_test(result, data, outputs[TEST], curves)
    return result


def announce(cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule, loggers: Sequence[Logger]) -> None:
    """The split's counts in the log, and the start of the run in its loggers."""
    for line in data.kept.summary_lines(names["split"]):
        log.info(line)
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.start(cfg, names, data)


def result_of(
    cfg: dict[str, Any],
    names: dict[str, str],
    data: AnomalyDataModule,
    model: AnomalyModule,
    outputs: dict[int, dict[str, Any]],
    timing: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The content of result.json that follows from the run's objects; `notes` are those of metrics."""
    measured, reasons = summary.measure(cfg["scoring"], data, outputs)
    cost, speed = efficiency(model, data, cfg["data"]["eval_batch_size"])
    date = {"date": time.strftime("%Y-%m-%dT%H:%M:%S")}
    return {
        **summary.describe(cfg, names, data, model),
        **measured,
        "timing": date | timing | speed | {"peak_memory_mb": peak_memory_mb()},
        "efficiency": cost,
        "environment": summary.environment(cfg, model, device),
        "notes": reasons,
    }


def test_loaders(data: AnomalyDataModule) -> list[Any]:
    """The loaders of a test run, in the order of `test_outputs`; the held-out images last, where there are some."""
    loaders = [data.test_dataloader(), data.train_eval_dataloader(sharded=True), data.val_dataloader()]
    return loaders if data.val_samples else loaders[:2]


def samples_of(data: AnomalyDataModule) -> dict[int, list[Sample]]:
    return {TEST: data.test_samples, NORMAL: data.train_samples, HELD_OUT: data.val_samples}


def check_fingerprint(cfg: dict[str, Any], data: AnomalyDataModule, stored: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError unless the data are those that the checkpoint was trained on."""
    if stored and stored["fingerprint"] != data.fingerprint:
        listed = f" (split.path={cfg['split']['path']} may have changed)" if cfg["split"].get("path") else ""
        raise UserError(
            f"data.root={data.root}: not the files that {checkpoint} was trained and tested on{listed}; train anew"
        )


def with_features(
    cfg: dict[str, Any], trainer: L.Trainer, data: AnomalyDataModule, model: AnomalyModule, fit: bool
) -> tuple[AnomalyDataModule, dict[str, Any]]:
    """The data with the frozen backbone's features in its batches, and result.json's `cache`."""
    assert model.backbone is not None
    cache = cfg.get("cache") or {"enabled": False}  # a stored run of an earlier version has none
    memory_gb = cfg["hardware"]["feature_memory_gb"]
    stored, report = precompute(trainer, data, model.backbone, cache, memory_gb, fit=fit)
    return data.with_features(stored, model.uses_images), report


def notes_of(cfg: dict[str, Any], data: AnomalyDataModule, model: AnomalyModule) -> list[str]:
    notes = list(data.notes)
    if model.backbone is not None and cfg["backbone"]["weights"] == "none":
        notes.append("the backbone's weights are random")
    if data.balanced and not model.total_steps:
        notes.append("data.balanced=true changes nothing: this method sees every training image once")
    return notes


def write(
    run: Path,
    data: AnomalyDataModule,
    outputs: dict[int, dict[str, Any]],
    curves: dict[str, Any],
    result: dict[str, Any],
    model: AnomalyModule,
) -> None:
    """Scores, maps, curves and figures, and result.json last: it says that the run is finished."""
    artifacts.write_scores(run, outputs[TEST])
    artifacts.write_maps(run, outputs[TEST], curves, summary.normal_columns(outputs))
    title = f"{result['method']}, seed {result['seed']}"
    write_figures(run / folder.FIGURES, data, outputs[TEST], result["thresholds"]["per_category"], title, model)
    training_figure(run / folder.FIGURES, data, model)
    artifacts.write_result(run, result)
