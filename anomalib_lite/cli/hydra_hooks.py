"""Hooks into Hydra: no empty folder after a failed start, no `_base` in --help, no needless composing."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.experimental.callback import Callback
from hydra.types import RunMode

#: Hydra's record of a sweep, written before its jobs are checked
SWEEP_RECORD = "multirun.yaml"
_new_folders: list[Path] = []


class NoteNewFolders(Callback):
    """Notes which folders this start will create. `hydra.callbacks` of conf/train.yaml names this class."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        _note(config.hydra.run.dir)

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        _note(config.hydra.sweep.dir)


def _note(place: str) -> None:
    folder = Path(place).absolute()
    _new_folders[:] = [each for each in (folder, *folder.parents) if not each.exists()]


@contextlib.contextmanager
def remove_empty_folders() -> Iterator[None]:
    """If the block fails, remove the folders that it created and left empty."""
    _new_folders.clear()
    try:
        yield
    except BaseException:
        for folder in _new_folders:
            with contextlib.suppress(OSError):  # also: not empty
                if [each.name for each in folder.iterdir()] == [SWEEP_RECORD]:
                    (folder / SWEEP_RECORD).unlink()
                folder.rmdir()
        raise


@contextlib.contextmanager
def no_private_choices() -> Iterator[None]:
    """Hydra lists every file of a group as a choice: hide those that are parts of others, such as data/_base.

    Hydra copies all configurations for each of its 80 groups; one copy makes --help twice as fast.
    """
    original = ConfigLoaderImpl.get_group_options
    copies: dict[Any, Any] = {}

    def public(
        self: Any,
        group_name: str,
        results_filter: Any = ObjectType.CONFIG,
        config_name: Any = None,
        overrides: Any = None,
    ) -> list[str]:
        key = (id(self), config_name, tuple(overrides or ()))
        if key not in copies:
            copies[key] = self._parse_overrides_and_create_caching_repo(config_name, overrides or [])[1]
        return [name for name in copies[key].get_group_options(group_name, results_filter) if not name.startswith("_")]

    ConfigLoaderImpl.get_group_options = public  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.get_group_options = original  # type: ignore[method-assign]


@contextlib.contextmanager
def mode_from_flags() -> Iterator[None]:
    """Hydra composes the whole configuration only to learn hydra.mode, and then once more: spare the first time.

    The flags alone decide where nothing on the command line can set hydra.mode: no study of experiments/, no
    configuration of the user's own.
    """
    original = Hydra.get_mode

    def get_mode(self: Any, config_name: Any, overrides: list[str]) -> Any:
        if re.search(r"(^|\n)\+*(experiments|hydra\.mode)\b|--?config|-c[dnp]\b", "\n".join(sys.argv[1:])):
            return original(self, config_name, overrides)
        return RunMode.MULTIRUN if {"-m", "--multirun"} & set(sys.argv[1:]) else RunMode.RUN

    Hydra.get_mode = get_mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = original  # type: ignore[method-assign]
