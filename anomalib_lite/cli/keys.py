"""Keys such as `data.batch_size` in a nested configuration, and the names that keys and classes had before."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from anomalib_lite.errors import UserError

#: old key -> new key, since 0.2
RENAMED = {
    "cache.type": "cache.dtype",
    "method.semantic": "method.classifier_weight",
    "method.look_every": "method.eval_every",
}
DEVICES = ("hardware.accelerator", "hardware.devices", "hardware.nodes", "hardware.ranks")
#: old module -> new module of a `_target_`, since 0.2
MOVED = {
    "anomalib_lite.backbones": "anomalib_lite.features.backbones",
    "anomalib_lite.methods.vision_language": "anomalib_lite.features.vision_language",
    "anomalib_lite.loggers": "anomalib_lite.tracking.csv_logger",
    "anomalib_lite.wandb_run": "anomalib_lite.tracking.wandb_logger",
}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"a.b.c": value}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        key: value for name, part in config.items() for key, value in flat(part, f"{prefix}.{name}".strip(".")).items()
    }


def lookup(config: Any, key: str, default: Any = None) -> Any:
    """config[a][b] for the key a.b, or the default."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def assign(config: dict[str, Any], key: str, value: Any) -> None:
    """config[a][b] = value for the key a.b; the groups must exist."""
    group, _, name = key.rpartition(".")
    parent = lookup(config, group) if group else config
    parent[name] = value


def overridden_key(override: str) -> str:
    """The key of an override such as seed=1, +method.more=1 or ~logger.wandb."""
    return override.lstrip("+~").partition("=")[0]


def reapply(
    overrides: Sequence[str], stored: dict[str, Any], config: dict[str, Any], groups: Collection[str]
) -> list[str]:
    """Apply the overrides of a stored run to the groups of `config` that were chosen anew, in place.

    As in Hydra, a value wins over the choice of its group: with hardware=ddp, a stored hardware.precision=32 stays. But
    the devices are those of the new choice.

    Args:
        stored: the run's configuration, which holds the values.

    Returns:
        the overrides without those whose key the new group lacks, unless they add the key (+).
    """
    remaining = []
    for override in overrides:
        key = overridden_key(override)
        group, _, name = key.rpartition(".")
        if key in DEVICES and "hardware" in groups:
            continue
        if key.partition(".")[0] in groups:
            parent = lookup(config, group)
            if not isinstance(parent, dict) or not (name in parent or override.startswith("+")):
                continue
            parent[name] = lookup(stored, key)
        remaining.append(override)
    return remaining


def short_key(key: str, among: Sequence[str]) -> str:
    """`method.norm` as `norm`, unless another of these keys ends in the same name."""
    last = [other.removesuffix("._target_").rpartition(".")[2] for other in (key, *among)]
    return last[0] if last[1:].count(last[0]) == 1 else key.removesuffix("._target_")


def each_value(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with a change to everything in it that is no dict or list."""
    if isinstance(value, dict):
        return {key: each_value(part, change) for key, part in value.items()}
    return [each_value(part, change) for part in value] if isinstance(value, list) else change(value)


def text_of(value: Any) -> Any:
    """A number or boolean of a YAML file as text: 2024 as "2024", true as "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def infinity_to_text(value: Any) -> Any:
    """Infinities and NaN as the text "inf", "-inf" or "nan": JSON has none."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def encodable(value: Any) -> Any:
    """Paths that are not UTF-8 with another character instead: pydantic takes no other text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def new_name(key: str) -> str:
    """The error for a renamed key."""
    return f"{key}: this key has a new name; give {RENAMED[key]}=VALUE"


def refuse_renamed(config: dict[str, Any]) -> None:
    """Raise UserError for the first key of a configuration that has a new name."""
    for key in _old_keys(config):
        raise UserError(new_name(key))


def translate(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with today's names of keys and classes, in the stored order."""
    old = list(_old_keys(config))

    def renamed(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [renamed(each, key) for each in value]
        if isinstance(value, dict):
            inner = {name: f"{key}.{name}".strip(".") for name in value}
            return {
                RENAMED[inner[name]].rpartition(".")[2] if inner[name] in old else name: renamed(each, inner[name])
                for name, each in value.items()
            }
        if key.endswith("_target_") and isinstance(value, str):
            module, _, name = value.rpartition(".")
            return f"{MOVED.get(module, module)}.{name}" if module else value
        return value

    return renamed(config, "")


def _old_keys(config: dict[str, Any]) -> Iterator[str]:
    """The keys of a configuration that were renamed; a user's own method may have options of any name."""
    own_method = not str(lookup(config, "method._target_", "")).startswith("anomalib_lite.")
    for key in RENAMED:
        if lookup(config, key, ...) is not ... and not (own_method and key.startswith("method.")):
            yield key


def method_defaults(target: Any) -> dict[str, Any]:
    """{"method.OPTION": default} of a method's constructor and those of its base classes; none of an unknown class."""
    from hydra.utils import get_class

    try:
        classes = inspect.getmro(get_class(str(target)))
    except Exception:  # what `build` says with its own words
        return {}
    constructors = [vars(each)["__init__"] for each in reversed(classes) if "__init__" in vars(each)]
    options = [x for each in constructors for x in inspect.signature(each).parameters.values()]
    return {f"method.{x.name}": x.default for x in options if x.default is not inspect.Parameter.empty}
