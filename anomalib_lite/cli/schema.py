"""Checks of the composed configuration, before anything heavy is imported or any folder is written."""

import contextlib
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.errors import UserError

#: what may differ between a run and its continuation
FREE_ON_RESUME = (
    "resume", "debug", "objective", "hardware", "logger", "cache", "trainer.log_every", "trainer.checkpoint_minutes",
    "data.root", "data.workers", "data.check", "data.eval_batch_size",
)  # fmt: skip


OBJECTIVE = re.compile(r"validation\.((image|pixel)_(auroc|ap|f1max)|aupro_\d+)")


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= low


def _optional(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or test(x)


def _size(x: Any) -> bool:
    return _integer(16)(x) or (isinstance(x, list) and len(x) == 2 and all(_integer(16)(n) for n in x))


def _share(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1


def _name(x: Any) -> bool:
    return isinstance(x, str | int) and not isinstance(x, bool)  # a folder may be called 01


def _names(x: Any) -> bool:
    return _name(x) or (isinstance(x, list) and bool(x) and all(map(_name, x)))


def _seconds(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x > 0


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda x: _integer(0)(x) and x < 2**32, "a whole number from 0, below 2^32"),
    "resume": (_flag, "true or false"),
    "debug": (_flag, "true or false"),
    "objective": (
        _optional(lambda x: isinstance(x, str) and bool(OBJECTIVE.fullmatch(x))),
        "a metric of held-out training images, such as validation.image_auroc: the test set chooses nothing",
    ),
    "data.category": (_names, "a name, a list such as [bottle,toothbrush], or all"),
    "data.image_size": (_size, "a whole number from 16, or [height, width]"),
    "data.batch_size": (_integer(1), "a whole number from 1"),
    "data.eval_batch_size": (_integer(1), "a whole number from 1"),
    "data.workers": (lambda x: x == "auto" or _integer(0)(x), "a whole number from 0, or auto"),
    "data.val_fraction": (_share, "a share from 0, below 1"),
    "data.check": (lambda x: x in ("fast", "thorough"), "fast or thorough"),
    "data.normalize": (lambda x: x in ("imagenet", "none"), "imagenet or none"),
    "data.drop_last": (_flag, "true or false"),
    "data.balanced": (_optional(_flag), "true or false"),
    "backbone.name": (_optional(lambda x: isinstance(x, str)), "the name of a timm model, or null"),
    "backbone.layers": (
        lambda x: isinstance(x, list) and all(_integer(0)(n) for n in x) and x == sorted(set(x)),
        "timm's out_indices in ascending order, such as [2,3]",
    ),
    "backbone.weights": (lambda x: isinstance(x, str) and bool(x), "auto, none, or a file"),
    "trainer.max_epochs": (_optional(_integer(0)), "a whole number from 0, or null"),
    "trainer.max_steps": (_optional(_integer(1)), "a whole number from 1, or null"),
    "trainer.log_every": (_integer(1), "a whole number from 1"),
    "trainer.checkpoint_minutes": (lambda x: isinstance(x, int | float) and x >= 0, "minutes from 0"),
    "hardware.accelerator": (lambda x: x in ("auto", "cpu", "gpu"), "auto, cpu or gpu"),
    "hardware.devices": (lambda x: x == "auto" or _integer(1)(x), "a whole number from 1, or auto"),
    "hardware.nodes": (_integer(1), "a whole number from 1"),
    "hardware.precision": (lambda x: x in ("auto", 32, "bf16"), "auto, 32 or bf16"),
    "hardware.threads": (_optional(_integer(1)), "a whole number from 1, or null"),
    "cache.enabled": (_flag, "true or false"),
    "cache.folder": (_optional(lambda x: isinstance(x, str) and bool(x)), "a folder, or null"),
    "cache.limit_gb": (lambda x: isinstance(x, int | float) and x >= 0, "gigabytes from 0"),
    "cache.type": (lambda x: x in ("auto", "bfloat16", "float16", "float32"), "auto, bfloat16, float16 or float32"),
    "hardware.feature_memory_gb": (lambda x: isinstance(x, int | float) and x >= 0, "gigabytes from 0"),
    "logger.wandb.mode": (
        _optional(lambda x: x in ("auto", "online", "offline", "disabled")),
        "auto, online, offline or disabled",
    ),
    "logger.wandb.tags": (_optional(lambda x: isinstance(x, list) and all(map(_name, x))), "a list of names, or null"),
    "logger.wandb.timeout": (_optional(_seconds), "seconds above 0"),
    "logger.wandb.upload_timeout": (_optional(_seconds), "seconds above 0"),
}


def make_absolute(cfg: dict[str, Any]) -> None:
    """Paths that a stored run is used with later, from wherever."""
    if cfg["data"]["root"] is not None:
        cfg["data"]["root"] = str(Path(cfg["data"]["root"]).expanduser().absolute())
    for split in (cfg["split"], cfg["data"]["split"]):
        if isinstance(split, dict) and isinstance(split.get("path"), str):
            split["path"] = str(Path(split["path"]).expanduser().absolute())
    name = str(cfg["backbone"]["name"])
    if "/" in name and Path(name).expanduser().is_dir():  # a checkpoint's folder, not a model of the hub
        cfg["backbone"]["name"] = str(Path(name).expanduser().absolute())
    if (cfg["backbone"].get("weights") or "none") not in ("auto", "none"):
        cfg["backbone"]["weights"] = str(Path(cfg["backbone"]["weights"]).expanduser().absolute())


def lookup(cfg: dict[str, Any], key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check(cfg: dict[str, Any]) -> None:
    """Raise UserError for the first value that means nothing."""
    for key, (test, wanted) in RULES.items():
        value = lookup(cfg, key)
        if not test(value):
            shown = json.dumps(value) if value is None or isinstance(value, bool) else value
            raise UserError(f"{key}={shown}: give {wanted}")
    if cfg["backbone"]["name"] is not None and not cfg["backbone"]["layers"]:
        raise UserError("backbone.layers=[]: give at least one of timm's out_indices, such as [2,3]")
    if "_target_" not in cfg["method"]:
        raise UserError(
            "method: no _target_ in it; does the method's YAML file begin with the line '# @package _global_'?"
        )
    if cfg["trainer"]["max_epochs"] is None and cfg["trainer"]["max_steps"] is None:
        raise UserError("trainer.max_epochs and trainer.max_steps are both null: give a budget")
    check_scoring(cfg["scoring"])
    check_split(cfg["split"])


def read_run(run: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Checkpoint, configuration and names of a run's folder; UserError where it holds no finished training."""
    if not run.is_dir():
        raise UserError(f"run={run}: no such folder")
    checkpoint, stored = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "config.json"
    for file in (stored, checkpoint):
        if not file.is_file():
            raise UserError(f"{file}: no such file; is run={run} the folder of a finished run?")
    try:
        content = json.loads(stored.read_text())
        return checkpoint, content["config"], content["names"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{stored}: damaged ({error}); train again") from error


def assign(cfg: dict[str, Any], key: str, value: Any) -> None:
    """cfg[a][b] = value for the key a.b, which must exist."""
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg.get(group) if isinstance(cfg, dict) else None  # type: ignore[assignment]
    if not isinstance(cfg, dict) or name not in cfg:
        raise UserError(f"{key}: the run's configuration has no such key")
    cfg[name] = value


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"a.b.c": value}."""
    if not isinstance(cfg, dict):
        return {prefix: cfg}
    return {
        key: value for name, part in cfg.items() for key, value in flat(part, f"{prefix}.{name}".strip(".")).items()
    }


def check_unchanged(old: dict[str, Any], new: dict[str, Any], run: Path) -> None:
    """Raise UserError naming the first key in which a continued run would differ from the one begun."""
    before, after = flat(old), flat(new)
    for key in sorted(before.keys() | after.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        if not free and before.get(key) != after.get(key):
            raise UserError(
                f"{key}={after.get(key)} but the run in {run} was begun with {before.get(key)}: "
                "resume with the same configuration, or start anew in another folder"
            )


def objective(name: str | None, result: dict[str, Any]) -> float | None:
    """A run's value of what a search maximises, `validation.METRIC`; None if no images were held out."""
    metrics = result["validation"]
    if name is None or metrics is None:
        return None
    key = name.partition(".")[2]
    if key not in metrics:
        raise UserError(f"objective={name}: no such metric; there are {', '.join(f'validation.{k}' for k in metrics)}")
    return metrics[key]


SPLIT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "imbalance": (
        lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 1 <= x < float("inf"),
        "a number from 1, such as 100",
    ),
    "order": (_names, "size, name, reverse, reverse_name, or a list of all categories, head first"),
    "seed": (_integer(0), "a whole number from 0"),
    "path": (lambda x: isinstance(x, str) and bool(x), "the file of the split, as in split=file split.path=FILE"),
    "head": (_optional(_integer(1)), "a number of classes from 1, or null for half of them"),
    "anomalous": (_flag, "true or false"),
}


def check_split(split: Any) -> None:
    """Raise UserError for a value of the `split` group that means nothing; names are judged with the data at hand."""
    for key, (test, wanted) in SPLIT.items():
        if isinstance(split, dict) and key in split and not test(split[key]):
            raise UserError(f"split.{key}={json.dumps(split[key])}: give {wanted}")


def check_scoring(scoring: dict) -> None:
    """Raise UserError for a value of the `scoring` group that means nothing."""
    for key in ("pixel_smooth", "image_smooth"):
        how = scoring[key]
        if key == "image_smooth" and isinstance(how, dict) and set(how) == {"pool"} and _integer(1)(how["pool"]):
            continue
        number = how.get("box", how.get("sigma")) if isinstance(how, dict) else how
        known = not isinstance(how, dict) or set(how) <= {"box", "times", "sigma", "size"}
        odd = not isinstance(how, dict) or all(how.get(k) is None or how[k] % 2 == 1 for k in ("box", "size"))
        positive = isinstance(number, int | float) and not isinstance(number, bool) and number > 0
        own = how == "auto" or (key == "image_smooth" and how == "same")
        if not (how is None or own or (known and odd and positive)):
            raise UserError(
                f"scoring.{key}={how}: give a sigma above 0, {{sigma: 4, size: 5}}, {{box: 11, times: 3}} "
                f"(odd sizes){', {pool: 16}' if key == 'image_smooth' else ''} or null"
            )
    size = scoring.get("map_size")  # a run of an earlier version has none
    if not (size is None or size == "original" or _size(size)):
        raise UserError(f"scoring.map_size={size}: give a whole number from 16, [height, width], original, or null")
    how = scoring["image_score"]
    if how not in ("auto", "own", "max", "mean") and not (isinstance(how, float) and 0 < how <= 1):
        raise UserError(
            f"scoring.image_score={how}: give max, mean, own, or a share such as 0.01 for the mean of the top 1 %"
        )
    if not (isinstance(scoring["quantile"], int | float) and 0 < scoring["quantile"] <= 1):
        raise UserError(f"scoring.quantile={scoring['quantile']}: give a share above 0 and at most 1")
    limits = scoring["fpr_limits"]
    if (
        not isinstance(limits, list)
        or not limits
        or any(not (isinstance(x, int | float) and 0 < x <= 1) for x in limits)
    ):
        raise UserError(f"scoring.fpr_limits={limits}: give a list of false positive rates above 0 and at most 1")


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", dict: "{key: value, ...}"}


def check_types(group: str, target: Any, options: dict[str, Any]) -> None:
    """Raise UserError for an option of `group` that is not of the type that its class's constructor is annotated with.

    Only plain types, optional ones and lists and dictionaries of them are judged; and what the class inherits, too.
    """
    hints: dict[str, Any] = {}
    for cls in reversed(getattr(target, "__mro__", ())):
        with contextlib.suppress(Exception):  # annotations that can't be evaluated
            hints |= typing.get_type_hints(cls.__init__)
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{group}.{name}={json.dumps(value)}: give {_kind(hints[name])}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, types.NoneType) else True


def _kind(hint: Any) -> str:
    """For people: a list of whole numbers, or null."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_kind(each) for each in inner)
    if origin in (list, Sequence):
        return f"a list such as [{', '.join({int: ('3', '5'), float: ('0.5', '1')}.get(inner[0], ('a', 'b')))}]"
    return "null" if hint is types.NoneType else KINDS.get(origin or hint, str(hint))
