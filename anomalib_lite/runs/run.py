"""One run as a list: data, method, trainer, features, fit, test, write."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from anomalib_lite.cli.keys import flat, method_defaults
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.reader_notes import missing_notes
from anomalib_lite.data.sampler import check_batch_size
from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError, enough_memory
from anomalib_lite.features.precompute import BATCH
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.graphs import check_devices
from anomalib_lite.paths import HOME
from anomalib_lite.runs import build, other_test_set, own_modules, summary
from anomalib_lite.runs.callbacks import Training
from anomalib_lite.runs.checkpoints import read_checkpoint
from anomalib_lite.runs.devices import lightning_options, peak_memory_mb
from anomalib_lite.runs.efficiency import no_speed, sizes
from anomalib_lite.runs.extras import write_with_extras
from anomalib_lite.runs.folder import stored_digests
from anomalib_lite.runs.held_features import with_features
from anomalib_lite.runs.run_logger import RunLogger
from anomalib_lite.runs.terminal import silence_libraries
from anomalib_lite.runs.test_outputs import HELD_OUT, NORMAL, TEST, Evaluation, scored_for_thresholds

log = logging.getLogger(__name__)
EXTRA_SECONDS = 60  # cost and figures may take this long each, and twice as long as the test


def execute(
    cfg: dict[str, Any],
    run: Path,
    names: dict[str, str],
    checkpoint: Path,
    overrides: Sequence[str],
    remarks: Sequence[str] = (),
    fit: bool = True,
    multirun: bool = False,
    may_differ: bool = False,
) -> dict[str, Any] | None:
    """Fit (from `checkpoint` on, if that file exists) or load it, test, and write the results into the folder `run`.

    Args:
        cfg: the resolved `train` configuration. names: its choices of `method` and `split`.
        overrides: the command line, for result.json. remarks: further notes for it.
        multirun: whether further runs follow in this process. may_differ: whether data.root may be another test set.

    Returns:
        result.json's content on rank 0, None on other ranks.
    """
    silence_libraries()
    options = lightning_options(cfg["hardware"], multirun) | {"log_every_n_steps": cfg["trainer"]["log_every"]}
    if fit:
        check_batch_size(cfg["data"]["batch_size"], options["devices"] * options["num_nodes"])
        check_devices(cfg["method"], options)
    used = checkpoint.is_file() and (cfg["resume"] or not fit)  # a new run uses no checkpoint, whatever lies there
    stored = read_checkpoint(checkpoint, cfg) if used else {}
    if not fit and not stored.get("finished", True):
        raise UserError(f"{checkpoint}: its training has not ended; resume=true hydra.run.dir={checkpoint.parents[1]}")
    remarks = [*own_modules.change_notes(cfg, stored_digests(checkpoint.parents[1])), *remarks]
    L.seed_everything(cfg["seed"], workers=True, verbose=False)

    data, other = read_data(cfg, stored, checkpoint, may_differ)
    model = make_model(cfg, data, stored, checkpoint)
    training, evaluation = Training(cfg, checkpoint, model.total_steps), Evaluation(run)
    loggers = build.make_loggers(cfg.get("logger"), run) if fit else []
    trainer = build.make_trainer(options, run, [training, evaluation], loggers, model.total_steps)
    if trainer.is_global_zero:
        announce(cfg, names, data, loggers)

    with build.all_ranks(trainer):
        fit = fit and not stored.get("finished", False)  # a run that was interrupted in its test is trained already
        data, cache = with_features(cfg, trainer, data, model, fit)
        if fit:
            with enough_memory(lambda: "data.batch_size" if training.started else "data.eval_batch_size", cfg, cache):
                trainer.fit(model, datamodule=data, ckpt_path=checkpoint if stored else None, weights_only=True)
            training.save(trainer)
        started = time.perf_counter()
        with enough_memory(lambda: "data.eval_batch_size", cfg, cache):
            weights = None if fit else checkpoint
            scored = scored_for_thresholds(data.train_samples, cfg["scoring"].get("threshold_images"), cfg["seed"])
            trainer.test(model, test_loaders(data, scored), ckpt_path=weights, weights_only=True, verbose=False)
        outputs = evaluation.gather(samples_of(data, scored), Path(data.root or "/"))
    if not trainer.is_global_zero:
        return None

    timing = {"fit_s": training.fit_s, "steps": training.steps, "test_s": time.perf_counter() - started}
    trained = checkpoint.parents[1] if other else None
    result, curves = result_of(cfg, names, data, model, outputs, timing, trainer.strategy.root_device, trained)
    result |= {"cache": cache, "overrides": list(overrides)}
    result["notes"] = [*notes_of(cfg, names["method"], data, model), *result["notes"], *remarks]
    device, limit = trainer.strategy.root_device, EXTRA_SECONDS + 2 * (time.perf_counter() - started)
    batch_size = measured_batch_size(cfg, data, cache)
    write_with_extras(run, result, data, outputs, curves, model, device, batch_size, loggers, limit)
    return result


def read_data(
    cfg: dict[str, Any], stored: dict[str, Any], checkpoint: Path, may_differ: bool
) -> tuple[AnomalyDataModule, bool]:
    """The data, and whether they are another test set than the run's, which they may be if `may_differ`."""
    data, other = other_test_set.read(cfg, stored) if may_differ else (build.make_data(cfg, stored), False)
    if not other:
        check_fingerprint(cfg, data, stored, checkpoint)
    return data, other


def make_model(cfg: dict[str, Any], data: AnomalyDataModule, stored: dict[str, Any], checkpoint: Path) -> AnomalyModule:
    """The method, with the checkpoint's weights if there is one; a new run's options are checked."""
    steps = build.budget(cfg, data)
    model = build.make_method(cfg, build.make_backbone(cfg, stored=bool(stored)), data, data.categories, steps)
    if stored:
        build.load_weights(model, checkpoint)  # features are computed with the checkpoint's backbone
    else:
        model.check_training()
    return model


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
    trained: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of result.json that follows from the run's objects, and the points of curves; `notes` are those of
    metrics.

    `trained` is the folder of the run whose model is tested on another test set. It gives the thresholds.
    """
    if trained:
        outputs |= other_test_set.normal_outputs(trained)
    measured, curves, reasons = summary.measure(cfg["scoring"], data, outputs)
    date = {"date": time.strftime("%Y-%m-%dT%H:%M:%S")}
    result = {
        **summary.describe(cfg, names, data, model),
        **measured,
        "timing": date | timing | no_speed() | {"peak_memory_mb": peak_memory_mb()},
        "efficiency": sizes(model),
        "environment": summary.environment(cfg, model, device),
        "notes": reasons,
    }
    if trained:
        other_test_set.mark(result, data, trained)
    return result, curves


def test_loaders(data: AnomalyDataModule, scored: Sequence[int]) -> list[Any]:
    """The loaders of a test run, in the order of `test_outputs`; the held-out images last, where there are some.

    `scored`: positions of the training images that thresholds come from.
    """
    normal = data.train_eval_dataloader(sharded=True, positions=scored)
    loaders = [data.test_dataloader(), normal, data.val_dataloader()]
    return loaders if data.val_samples else loaders[:2]


def samples_of(data: AnomalyDataModule, scored: Sequence[int]) -> dict[int, list[Sample]]:
    return {TEST: data.test_samples, NORMAL: [data.train_samples[i] for i in scored], HELD_OUT: data.val_samples}


def check_fingerprint(cfg: dict[str, Any], data: AnomalyDataModule, stored: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError unless the data, and the names of their categories, are those that the checkpoint was trained on.

    The fingerprint does not contain the names, which seed what is drawn and give the order of the model's categories.
    """
    if not stored:
        return
    if stored["fingerprint"] != data.fingerprint:
        listed = f" (split.path={cfg['split']['path']} may have changed)" if cfg["split"].get("path") else ""
        raise UserError(
            f"data.root={data.root}: not the files that {checkpoint} was trained and tested on{listed}; train anew"
        )
    before, now = ([str(name) for name in names] for names in (stored["categories"], data.categories))
    if before != now:
        raise UserError(
            f"data.category: {checkpoint} was trained on {', '.join(before)}, and the data's categories are called "
            f"{', '.join(now)} now; give them their earlier names, in the same order"
        )


def measured_batch_size(cfg: dict[str, Any], data: AnomalyDataModule, cache: dict[str, Any]) -> int | None:
    """The largest batch that the run has evaluated, at which its cost is measured; None if it is not to be measured."""
    if not cfg["hardware"].get("measure_cost", True):
        return None
    return min(data.eval_batch_size, BATCH) if cache["used"] else data.eval_batch_size


def notes_of(cfg: dict[str, Any], choice: str, data: AnomalyDataModule, model: AnomalyModule) -> list[str]:
    """Notes on the data, the method and the options. `summary.measure` notes what can't be measured, by metric."""
    repeated = missing_notes(data.train_samples, data.test_samples)
    notes = [note for note in data.notes if note not in repeated]
    notes += [*model.notes(), *without_effect(cfg["method"], choice, model)]
    if data.tiling and data.train_samples and model.total_steps:
        most = max(data.tile_counts[sample.path] for sample in data.train_samples)
        epochs = -(-model.total_steps // data.batches_per_epoch)
        seen = f"{epochs} of up to {most} tiles" if epochs < most else "all tiles"
        notes.append(f"data.tiling: every epoch of training sees one tile of each image; {epochs} epochs saw {seen}")
    if model.backbone is not None and cfg["backbone"]["weights"] == "none":
        notes.append("the backbone's weights are random")
    if data.balanced and not model.total_steps:
        notes.append("data.balanced=true changes nothing: this method sees every training image once")
    return notes


def without_effect(options: dict[str, Any], choice: str, model: AnomalyModule) -> list[str]:
    """A note for each setting that leaves options of the method with another value than their default without effect.

    Args:
        options: the `method` group of the configuration. choice: its name, such as norm_occ.
    """
    file = HOME / "conf" / "method" / f"{choice}.yaml"
    ours: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    standard = method_defaults(options.get("_target_")) | flat(ours.get("method", {}), "method")
    changed = [key for key, value in flat(options, "method").items() if standard.get(key, ...) != value]
    useless: dict[str, list[str]] = {}
    for option, setting in model.without_effect().items():
        below = [key for key in changed if f"{key}.".startswith(f"method.{option}.")]
        useless.setdefault(setting, []).extend(below)
    return [
        f"{', '.join(dict.fromkeys(keys))} {'has' if len(keys) == 1 else 'have'} no effect with {setting}"
        for setting, keys in useless.items()
        if keys
    ]
