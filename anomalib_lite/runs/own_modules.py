"""Modules of the user's own that a run's `_target_`s name, such as mine.py: found again from any folder.

A run stores the folder of each. A module that is not found otherwise is read from this folder, and from no other.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anomalib_lite.cli.keys import lookup
from anomalib_lite.errors import UserError

INSTALLED = {"site-packages", "dist-packages"}
log = logging.getLogger(__name__)


def places(config: dict[str, Any]) -> dict[str, str]:
    """{module: folder} of the modules that the configuration names and that are neither installed nor Python's own."""
    python = Path(sysconfig.get_path("stdlib"))
    found = {name: _place(_spec(name)) for name in map(_module, _targets(config)) if name != "anomalib_lite"}
    return {
        name: str(place)
        for name, place in found.items()
        if place and not place.is_relative_to(python) and not INSTALLED & set(place.parts)
    }


def digests(config: dict[str, Any]) -> dict[str, str]:
    """{module: SHA-256} of the same modules: of a file, or of all Python files of a package."""
    return {name: digest(name, place) for name, place in places(config).items()}


@functools.cache
def digest(name: str, place: str) -> str:
    """It is read once: what this process imports is what it found at its start, also if the file changes then."""
    module, package, content = Path(place, f"{name}.py"), Path(place, name), hashlib.sha256()
    is_file = module.is_file() and not (package / "__init__.py").is_file()  # otherwise Python reads the folder
    for file in [module] if is_file else sorted(package.rglob("*.py")):
        with contextlib.suppress(OSError):
            content.update(f"{file.relative_to(place)}\n".encode(errors="surrogateescape") + file.read_bytes())
    return content.hexdigest()


def changed(config: dict[str, Any], stored: dict[str, str]) -> list[str]:
    """The modules that are not as they were when the run was started; a run of an earlier version stored nothing.

    Args:
        stored: the run's digests.
    """
    return [name for name, found in digests(config).items() if stored.get(key_of(name), found) != found]


def change_notes(config: dict[str, Any], stored: dict[str, str]) -> list[str]:
    """A note for each changed module, see `changed`."""
    return [f"the module {name} is not as it was when the run was started" for name in changed(config, stored)]


def key_of(module: str) -> str:
    """The name of a module's digest among a run's digests."""
    return f"module {module}"


def make_importable(config: dict[str, Any], stored: dict[str, str]) -> None:
    """Append the folder of each module that is found nowhere else to sys.path.

    Args:
        config: the run's. stored: the run's `places`; empty for a run of an earlier version.

    Raises:
        UserError: the method's module is not there either.
    """
    for target in _targets(config):
        name = _module(target)
        if name in sys.modules or _spec(name):
            continue
        importlib.invalidate_caches()
        place = stored.get(name)
        if place and PathFinder.find_spec(name, [place]):
            sys.path.append(place)
            log.warning("the module %s is read from %s, where it lay when the run was started", name, place)
        elif target == lookup(config, "method._target_"):
            where = f"; it lay in {place} when the run was started, and is not there now" if place else ""
            raise UserError(
                f"method._target_={target}: the module {name} is not found{where}; start in the folder that holds "
                f"{name}.py, or add this folder to PYTHONPATH"
            )


def _targets(config: Any) -> Iterator[str]:
    """The values of all keys `_target_`."""
    parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    if isinstance(config, dict) and isinstance(config.get("_target_"), str):
        yield config["_target_"]
    for part in parts:
        yield from _targets(part)


def _module(target: str) -> str:
    """The module or package that lies in a folder of sys.path."""
    return target.partition(".")[0]


def _spec(name: str) -> ModuleSpec | None:
    with contextlib.suppress(ValueError):  # an empty name, or a module without a spec, such as __main__
        return find_spec(name)
    return None


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder in which a module's file or a package's folder lies; None for a module without a file."""
    if spec is None:
        return None
    if folders := list(spec.submodule_search_locations or ()):
        return Path(folders[0]).absolute().parent
    return Path(spec.origin).absolute().parent if spec.origin and spec.has_location else None
