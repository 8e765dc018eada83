"""Hooks into Hydra: folders named after the time can't meet, a failed start leaves no empty folder, --help lists no
file that is no choice, and a start composes its configuration once.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf, open_dict, read_write

#: Hydra's record of a sweep, written before its jobs are checked
SWEEP_RECORD = "multirun.yaml"
#: files in groups that are for other programs; files whose name begins with `_` are parts of others
NO_CHOICES = ("experiments/published", "experiments/wandb_sweep")
_new_folders: list[Path] = []


class NoteNewFolders(Callback):
    """Notes which folders this start will create. `hydra.callbacks` of conf/train.yaml names this class.

    A folder that is named after the time belongs to this start alone: if another one has it, a number is appended.
    """

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        _note(config.hydra.run)

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        if own := _note(config.hydra.sweep):
            with read_write(config.hydra), open_dict(config.hydra):  # Hydra composes the jobs anew, from the overrides
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{own}'")


def _note(place: Any) -> Path | None:
    """Note the new folders of Hydra's node `run` or `sweep`; the folder that it gets if it is named after the time."""
    folder = Path(place.dir).absolute()
    _new_folders[:] = [each for each in (folder, *folder.parents) if not each.exists()]
    timed = "${now:" in str(OmegaConf.to_container(place, resolve=False)["dir"])  # type: ignore[index, call-overload]
    first_rank = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if not timed or not first_rank:
        return None
    own = _new_folder(Path(place.dir))
    _new_folders[:] = dict.fromkeys([own.absolute(), *_new_folders])
    with read_write(place), open_dict(place):
        place.dir = str(own)
    return own


def _new_folder(folder: Path) -> Path:
    """Create the folder, or the first of FOLDER-2, FOLDER-3, … that does not exist yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        own = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            own.mkdir()  # atomic: of two starts one creates it
            break
    return own


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
def replaced(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """In the block, a class of Hydra's has this function in place of its own."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_private_choices() -> contextlib.AbstractContextManager[None]:
    """Hydra lists every file of a group as a choice: hide NO_CHOICES and parts of others, such as data/_base.

    Hydra copies all configurations for each of its 80 groups; one copy makes --help twice as fast.
    """
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
        names = copies[key].get_group_options(group_name, results_filter)
        return [name for name in names if not name.startswith("_") and f"{group_name}/{name}" not in NO_CHOICES]

    return replaced(ConfigLoaderImpl, "get_group_options", public)


def mode_from_flags() -> contextlib.AbstractContextManager[None]:
    """Hydra composes the whole configuration only to learn hydra.mode, and then once more: spare the first time.

    The flags alone decide where nothing on the command line can set hydra.mode: no study of experiments/, no
    configuration of the user's own, also none of a folder in hydra.searchpath.
    """
    original = Hydra.get_mode

    def get_mode(self: Any, config_name: Any, overrides: list[str]) -> Any:
        pattern = r"(^|\n)\+*(experiments|hydra\.(mode|searchpath))\b|--?config|-c[dnp]\b"
        if re.search(pattern, "\n".join(sys.argv[1:])):
            return original(self, config_name, overrides)
        return None  # Hydra then sets hydra.mode by the flags

    return replaced(Hydra, "get_mode", get_mode)
