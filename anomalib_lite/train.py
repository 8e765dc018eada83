"""Train and evaluate a method: python -m anomalib_lite.train method=… data=… (see --help).

Nothing heavy is imported before the configuration has been accepted: --help and --cfg answer at once.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from anomalib_lite import cli
from anomalib_lite.errors import UserError

log = logging.getLogger(__name__)


def main() -> None:
    cli.run(train, "train")


def train(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from anomalib_lite import configuration

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    configuration.check(plain)
    run = open_run(cfg, plain)
    if run is None:
        return

    import lightning as L  # noqa: N812
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import instantiate

    from anomalib_lite.callbacks import FillFeatures, Training, quiet
    from anomalib_lite.evaluation import TEST, Evaluation
    from anomalib_lite.loggers import make_loggers
    from anomalib_lite.hardware import device_name, lightning_options, peak_memory_mb

    quiet()
    hardware = lightning_options(plain["hardware"], HydraConfig.get().mode == RunMode.MULTIRUN)
    if hardware["devices"] * plain["hardware"]["nodes"] > plain["data"]["batch_size"]:
        raise UserError(f"data.batch_size={plain['data']['batch_size']} is fewer than hardware.devices")
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    data = instantiate(cfg.data)
    data.setup()
    notes = list(data.notes)

    backbone = None
    if cfg.backbone.name is not None:
        backbone = instantiate(cfg.backbone, precision=cfg.hardware.precision)
        if backbone.weights == "none":
            notes.append("the backbone has random weights")
    context = {"scoring": plain["scoring"], "image_size": data.image_size, "categories": data.categories}
    model = instantiate(cfg.method, backbone=backbone, **context, _convert_="all")
    loggers = make_loggers(cfg.logger, run)

    checkpoint = run / "checkpoints" / "last.ckpt"
    training, filling, evaluation = Training(plain, checkpoint), FillFeatures(cfg.hardware.feature_memory_gb), Evaluation()
    trainer = L.Trainer(
        **hardware,
        max_epochs=-1 if plain["trainer"]["max_epochs"] is None else plain["trainer"]["max_epochs"],
        logger=loggers,
        callbacks=[training, filling, evaluation],
        deterministic="warn",
        default_root_dir=run,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed = checkpoint if checkpoint.is_file() else None
    trainer.fit(model, datamodule=data, ckpt_path=resumed, weights_only=True)
    training.save(trainer)
    tested = time.perf_counter()
    loaders = [data.test_dataloader(), data.normal_dataloader(sharded=True), data.val_dataloader()]
    trainer.test(model, [loader for loader in loaders if loader], verbose=False)
    if not trainer.is_global_zero:
        return
    device = device_name(trainer.strategy.root_device)
    timing = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "fit_s": training.fit_s,
        "steps": training.steps,
        "test_s": time.perf_counter() - tested,
        "images_per_s": len(data.test_samples) / max(evaluation.seconds[TEST], 1e-9),
        "peak_memory_mb": peak_memory_mb(),
    }
    setting = describe(cfg, plain, model, data)
    write_run(run, setting, data, evaluation.arrays, plain["scoring"], notes, timing, filling.report, device)


def describe(cfg: Any, plain: dict[str, Any], model: Any, data: Any) -> dict[str, Any]:
    """What was run: the first part of result.json."""
    from hydra.core.hydra_config import HydraConfig

    hydra, resize = HydraConfig.get(), plain["data"]
    transform = resize["transform"] or [{"resize": list(data.image_size), "filter": resize["resample"], "as": "PIL"}]
    scoring = {key: value for key, value in plain["scoring"].items() if key not in ("quantile", "fpr_limits")}
    return {
        "method": hydra.runtime.choices.method,
        "variant": getattr(model, "variant", None),
        "dataset": data.name,
        "categories": data.categories,
        "setting": "single" if len(data.categories) == 1 else "unified",
        "split": {"name": hydra.runtime.choices.split}
        | {key: value for key, value in plain["split"].items() if not key.startswith("_")},
        "backbone": None if model.backbone is None else {"name": model.backbone.name, "layers": model.backbone.layers},
        "weights": None if model.backbone is None else Path(model.backbone.weights).name,
        "seed": cfg.seed,
        "protocol": {
            "data": {
                "transform": transform,
                "map_size": list(model.image_size),
                "mask": "nearest, > 0",
                "fpr_limits": plain["scoring"]["fpr_limits"],
            },
            "scoring": scoring | {"weights": "last"},
        },
        "overrides": list(hydra.overrides.task),
    }


def write_run(
    run: Path,
    setting: dict[str, Any],
    data: Any,
    arrays: dict[int, dict[str, Any]],
    scoring: dict[str, Any],
    notes: list[str],
    timing: dict[str, Any],
    cache: dict[str, Any],
    device: str,
) -> None:
    """Compute the metrics, write the run's files, and show the table."""
    from anomalib_lite import evaluation, results
    from anomalib_lite.figures import write_figures

    test, names = arrays[evaluation.TEST], data.categories
    per_category, missing = evaluation.category_metrics(data.test_samples, names, test, data.has_masks, scoring["fpr_limits"])
    mean, partial = evaluation.mean_metrics(per_category)
    validation = None
    if evaluation.HELD_OUT in arrays:
        masks = dict.fromkeys(names, True)
        held_out = arrays[evaluation.HELD_OUT]
        found, _ = evaluation.category_metrics(data.val_samples, names, held_out, masks, scoring["fpr_limits"])
        validation = evaluation.mean_metrics(found)[0]
    limits = evaluation.thresholds(data.train_samples, names, arrays[evaluation.NORMAL], scoring["quantile"])
    result = {
        "schema": results.SCHEMA,
        **{key: value for key, value in setting.items() if key != "overrides"},
        "metrics": mean,
        "per_category": per_category,
        "groups": None,
        "validation": validation,
        "thresholds": limits,
        "data": {
            "fingerprint": data.fingerprint,
            "train_counts": data.train_counts,
            "train_anomalous": sum(sample.label for sample in data.train_samples),
            "test_counts": data.test_counts,
        },
        "timing": timing,
        "efficiency": None,
        "cache": cache,
        "environment": results.environment(device),
        "overrides": setting["overrides"],
        "notes": notes + missing + partial,
    }
    root = Path(data.root)
    results.write_scores(run, root, data.test_samples, test["scores"])
    curves = evaluation.curves(data.test_samples, names, test, data.has_masks)
    results.write_maps(run, root, data.test_samples, test["maps"], curves)
    write_figures(run / "figures", data.test_samples, names, test, limits, setting["method"])
    results.write_result(run, result)
    results.show(run, result)


def open_run(cfg: Any, plain: dict[str, Any]) -> Path | None:
    """The run's folder with its configuration in .hydra/; None if a continued run is finished already.

    Raises:
        UserError: the folder holds another run, or the one to be continued has another configuration.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from anomalib_lite import configuration, results

    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return run
    stored = run / "checkpoints" / "config.json"
    if stored.is_file() and not cfg.resume:
        raise UserError(f"{run} already holds a run: add resume=true to continue it, or choose another hydra.run.dir")
    if stored.is_file():
        configuration.check_unchanged(json.loads(stored.read_text()), plain, run)
    if cfg.resume and (run / "result.json").is_file():
        log.info("this run is finished: nothing to do")
        results.show(run, results.read_result(run))
        return None
    (run / "checkpoints").mkdir(exist_ok=True)
    results.write_text(stored, json.dumps(plain, indent=1))
    (run / ".hydra").mkdir(exist_ok=True)
    (run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (run / ".hydra" / "hydra.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra})))
    (run / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(hydra.overrides.task))
    return run


if __name__ == "__main__":
    main()
