"""Notes on options of the method that were set but have no effect, because of another option."""

from typing import Any

from omegaconf import OmegaConf

from anomalib_lite.cli.keys import flat, method_defaults
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.paths import HOME


def notes(options: dict[str, Any], choice: str, model: AnomalyModule) -> list[str]:
    """A note for each setting that leaves options with another value than their default without effect.

    Args:
        options: the `method` group of the configuration. choice: its name, such as norm_occ.
    """
    standard = defaults(options.get("_target_"), choice)
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


def defaults(target: Any, choice: str) -> dict[str, Any]:
    """{"method.OPTION": default} of the package's YAML file; where it names no default, of the method's constructor."""
    file = HOME / "conf" / "method" / f"{choice}.yaml"
    ours: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return method_defaults(target) | flat(ours.get("method", {}), "method")
