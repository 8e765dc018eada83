"""From the resolved configuration to a run's objects: data, backbone, method, loggers, trainer."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from lightning.pytorch.loggers import Logger

from anomalib_lite.cli.annotations import check_types
from anomalib_lite.cli.messages import not_located
from anomalib_lite.data.data_options import READER_KEYS
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.transforms import pair
from anomalib_lite.data.value_range import Pixels
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs.checkpoints import CheckpointFile

log = logging.getLogger(__name__)


def make_data(cfg: dict[str, Any], stored: dict[str, Any] | None = None) -> AnomalyDataModule:
    """The data, read, checked and split. `stored`: what the checkpoint of a trained or resumed run holds."""
    trained: dict[str, Any] = {}
    if stored:
        reader = {"_target_": "anomalib_lite.data.readers.read_as_trained", "_partial_": True}
        reader |= {"reader": cfg["data"]["reader"], "names": stored["categories"]}
        cfg = cfg | {"data": cfg["data"] | {"reader": reader}}
        trained = {"first_batch": stored["steps"], "pixels": stored_pixels(stored)}
    data = data_module(cfg, map_size=cfg["scoring"].get("map_size"), **trained)
    data.setup()
    return data


def make_test_set(cfg: dict[str, Any], stored: dict[str, Any]) -> AnomalyDataModule:
    """The test images below data.root alone, for a run that was trained on other data of its categories."""
    reader = {"_target_": "anomalib_lite.data.readers.read_test_set", "_partial_": True, "like": cfg["data"]["name"]}
    plain = {"val_fraction": 0.0, "split": None, "balanced": False, "category": stored["categories"], "reader": reader}
    cfg = cfg | {"data": {key: value for key, value in cfg["data"].items() if key not in READER_KEYS} | plain}
    data = data_module(cfg, map_size=cfg["scoring"].get("map_size"), pixels=stored_pixels(stored))
    data.setup()
    return data


def stored_pixels(stored: dict[str, Any]) -> Pixels:
    """Depth and value range of the images that a checkpoint was trained on; versions before 0.2 stored none."""
    depth, value_range = stored.get("pixels") or (None, None)
    return Pixels(depth, tuple(value_range) if value_range else None)


def data_module(cfg: dict[str, Any], **options: Any) -> AnomalyDataModule:
    """The DataModule, without its data. data.normalize=backbone becomes the numbers of the configured backbone."""
    if cfg["data"].get("normalize") == "backbone":
        name, kind = cfg["backbone"]["name"], _backbone_maker(cfg)
        if name is None or not hasattr(kind, "normalisation"):
            raise UserError(
                "data.normalize=backbone: there is no backbone of timm; give imagenet, none, or mean and std"
            )
        options["normalize"] = kind.normalisation(name)
    with warnings.catch_warnings(record=True) as caught:
        data = instantiate(cfg["data"], **options)
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if "not valid for transform" in text:  # albumentations ignores such options
            raise UserError(f"data.transform or data.augment: {text}; correct the option's name")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return data


def make_backbone(cfg: dict[str, Any], stored: bool = False) -> Backbone | None:
    """The backbone; None where there is none or the method has no use for it, as in a sweep over methods.

    With `stored`, a checkpoint will give the weights, so no others are read. The configuration of a model from a folder
    (local-dir:) or the hub (hf_hub:), and of a vision–language model, is read there.
    """
    if cfg["backbone"]["name"] is None or not getattr(_method_class(cfg), "uses_backbone", True):
        return None
    options: dict[str, Any] = {"weights": "none"} if stored else {}
    known = inspect.signature(_backbone_maker(cfg)).parameters
    if "image_sizes" in known:  # a user's backbone may have no such argument
        options["image_sizes"] = image_sizes(cfg["data"])
    if "tokens" in known and getattr(_method_class(cfg), "uses_tokens", False):
        options["tokens"] = True
    return instantiate(cfg["backbone"], precision=cfg["hardware"]["precision"], **options)


def image_sizes(data: dict[str, Any]) -> list[list[int]]:
    """The sizes [H, W] in which a backbone sees images: of training, and of test where textures have another one."""
    if data.get("tiling"):
        return [list(pair(data["tiling"]["size"]))]
    texture = data.get("texture_size", "original") if data.get("treatment", "object") != "object" else "original"
    sizes = [data["image_size"], *([] if texture == "original" else [texture])]
    return [list(pair(size)) for size in sizes]


def make_method(
    cfg: dict[str, Any], backbone: Backbone | None, data: AnomalyDataModule, categories: list[str], steps: int = 0
) -> AnomalyModule:
    """The method on its backbone, with a budget of so many batches in each of its phases."""
    check_types("method", _method_class(cfg), cfg["method"])
    context = {
        "image_size": data.image_size,
        **({"tiling": data.tiling} if data.tiling else {"test_size": data.test_size}),
        "categories": categories,
        "precision": str(cfg["hardware"]["precision"]),
        "steps": steps,
    }
    model = instantiate(cfg["method"], backbone=backbone, scoring=cfg["scoring"], **context, _convert_="all")
    check_context(model, cfg, context)
    if open_keys := [key for key, value in model.scoring.items() if value == "auto"]:
        raise UserError(f"scoring.{open_keys[0]}=auto: this method has none of its own; give a value")
    return model


def check_context(model: Any, cfg: dict[str, Any], context: dict[str, Any]) -> None:
    """UserError unless the method is an AnomalyModule whose constructor handed its context on to AnomalyModule."""
    target = f"method._target_={cfg['method']['_target_']}"
    if not isinstance(model, AnomalyModule):
        raise UserError(f"{target}: {type(model).__name__} is no AnomalyModule; derive it from that class")
    if type(model).anomaly_map is AnomalyModule.anomaly_map:
        raise UserError(f"{target}: {type(model).__name__} defines no anomaly_map; see AnomalyModule's docstring")
    lost = [name for name, value in context.items() if _list(getattr(model, name)) != _list(value)]
    lost += ["scoring"] * (not cfg["scoring"].keys() <= model.scoring.keys())  # a method may change its values
    if lost:
        raise UserError(
            f"{target}: its constructor does not hand {', '.join(lost)} on to AnomalyModule; write "
            "def __init__(self, ..., **context) and super().__init__(**context)"
        )


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _method_class(cfg: dict[str, Any]) -> Any:
    """The method's class; None for a wrong name, which is reported where the method is made."""
    with contextlib.suppress(Exception):
        return get_method(cfg["method"]["_target_"])
    return None


def _backbone_maker(cfg: dict[str, Any]) -> Any:
    """The backbone's class, or a function that makes it; UserError where it can't be imported."""
    target = cfg["backbone"]["_target_"]
    try:
        return get_method(target)
    except Exception as error:
        raise UserError(not_located(str(target), error)) from error


def load_weights(model: AnomalyModule, checkpoint: Path) -> None:
    """All weights and buffers from a checkpoint, the frozen backbone's too.

    Raises:
        UserError: the checkpoint is another method's.
    """
    try:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(": ")[2][:200]
        raise UserError(f"{checkpoint}: damaged, or not a checkpoint of {type(model).__name__} ({reason})") from error


def budget(cfg: dict[str, Any], data: AnomalyDataModule) -> int:
    """Batches in each phase of training: trainer.max_steps or max_epochs, whichever comes first.

    It is 0 for a method in closed form, which has no batches to count.
    """
    method = _method_class(cfg)
    if getattr(method, "training_step", None) is AnomalyModule.training_step:
        return 0
    steps, epochs = cfg["trainer"]["max_steps"], cfg["trainer"]["max_epochs"]
    limits = [steps, None if epochs is None else epochs * data.batches_per_epoch]
    return min(limit for limit in limits if limit is not None)


def make_loggers(cfg: dict[str, Any] | None, folder: Path) -> list[Logger]:
    """The loggers of the configuration's group `logger`, constructed with their options and the run's folder.

    A logger whose options are null is left out, and with a warning one that can't be constructed. Only for `csv` the
    exception is raised: every run has its metrics.csv.
    """
    loggers = []
    for name, options in (cfg or {}).items():
        if options is None:
            continue
        try:
            loggers.append(instantiate(options, run_dir=str(folder)))
        except InstantiationException as error:
            if name == "csv":
                raise
            log.warning("logger.%s is left out: %s", name, " ".join(str(error).split()))
    return loggers


def make_trainer(
    options: dict[str, Any], folder: Path, callbacks: list[L.Callback], loggers: list[Logger], steps: int
) -> L.Trainer:
    """Lightning's Trainer. `options` are those of `runs.devices` and more; Training counts `steps` and ends the run."""
    trainer = L.Trainer(
        **options | {"plugins": [CheckpointFile(), *options.get("plugins", [])]},
        max_epochs=-1 if steps else 0,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=folder,
        limit_val_batches=0,
        use_distributed_sampler=False,  # the DataModule itself shares the samples out to the ranks, without padding
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Otherwise every torch.empty is filled with NaN, also inside operators. It changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # cli.signals handles them. Lightning's handler of SIGTERM talks to the other ranks from within their own exchanges.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextlib.contextmanager
def all_ranks(trainer: L.Trainer) -> Iterator[None]:
    """Start the other ranks, which repeat the command, and join their process group.

    Lightning would do so in `fit`. Features are computed by all ranks before that. An error here ends the others.
    """
    launcher: Any = trainer.strategy.launcher
    try:
        if launcher is None:
            trainer.strategy.setup_environment()
        else:
            launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        yield
    except BaseException:
        for process in getattr(launcher, "procs", []):
            process.kill()
        raise
