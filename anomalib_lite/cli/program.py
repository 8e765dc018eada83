"""Flags, the configuration, errors as one line, exit codes: what the programs share. Imports nothing heavy."""

import argparse
import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from anomalib_lite.cli import signals
from anomalib_lite.console import protect_streams
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME


def run(task: Callable[[Any], Any], config_name: str) -> None:
    """Compose the configuration from the command line and run `task(cfg)`; an error is one line, exit code 2.

    A start that fails leaves no empty folder behind.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing a report of its own
    prepare()
    import hydra

    from anomalib_lite.cli.help import explained_help
    from anomalib_lite.cli.hydra_hooks import mode_from_flags, no_private_choices, remove_empty_folders

    @functools.wraps(task)
    def job(cfg: Any) -> Any:
        with reported():  # inside Hydra, which would add a line of its own
            return task(cfg)

    hooks = (signals.as_interrupts, remove_empty_folders, no_private_choices, mode_from_flags, explained_help)
    with reported(outside=True), contextlib.ExitStack() as entered:
        for hook in hooks:
            entered.enter_context(hook())
        _parse_arguments()
        hydra.main(version_base="1.3", config_path=str(HOME / "conf"), config_name=config_name)(job)()


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `train` configuration that these overrides give, and the values that its study sweeps over, by key.

    Raises Hydra's errors, as for an unknown choice.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(cfg)  # some studies' values depend on the chosen method
        names = [str(key) for key in cfg if key != "hydra"]
        plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, names), resolve=True)
        swept: Any = OmegaConf.to_container(OmegaConf.create({"params": cfg.hydra.sweeper.get("params") or {}}))
    finally:
        HydraConfig.instance().cfg = before  # Lightning would take it for a program of Hydra that starts its own ranks
    return plain, swept["params"]


def run_plain(
    task: Callable[[dict[str, Any]], None], usage: str | None, texts: Sequence[str], flags: Sequence[str] = ()
) -> None:
    """The same for a program whose arguments are all KEY=VALUE: runs `task(options)`.

    Values are read in Hydra's grammar, as in training. Those of the keys in `texts` (paths and names) stay as typed.
    A key in `flags` may be written --KEY in place of KEY=true.
    """
    prepare()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((usage or "").strip())
        return
    with reported(folder="output"), signals.as_interrupts():
        options: dict[str, Any] = {}
        for argument in sys.argv[1:]:
            if argument.removeprefix("--") in flags and argument.startswith("--"):
                options[argument.removeprefix("--")] = True
                continue
            key, equals, text = argument.partition("=")
            if not equals or not key:
                raise UserError(f"{argument}: arguments are KEY=VALUE; see --help")
            options[key] = text if key in texts else _value(argument)
        task(options)


def run_flags(
    task: Callable[[Sequence[str]], None], usage: str | None, outside: bool = False, folder: str = "hydra.run.dir"
) -> None:
    """The same for a program with flags: runs `task(arguments)`. `outside`, `folder`: see `messages.one_line`."""
    prepare()
    with reported(outside, folder):
        if {"-h", "--help"} & set(sys.argv[1:]):
            print((usage or "").strip(), flush=True)
            return
        task(sys.argv[1:])


class Parser(argparse.ArgumentParser):
    """The parser of programs with flags: a mistake is a UserError."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def prepare() -> None:
    """Settings of the process, before torch is imported.

    OpenMP's threads wait without spinning: otherwise runs that share cores slow each other down a hundredfold. A
    user's method file in the current folder is importable, also from the console scripts. Printing can't fail.
    """
    protect_streams()
    logging.getLogger("hydra.utils").addFilter(_nothing)  # it logs errors that it raises, and we report
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _value(argument: str) -> Any:
    from hydra.core.override_parser.types import Sweep

    from anomalib_lite.cli import values

    value = values.read(values.as_typed(argument))
    if isinstance(value, Sweep):
        raise UserError(f"{argument}: give one value; a list has brackets, and text with special characters quotes")
    return value


@contextlib.contextmanager
def reported(outside: bool = False, folder: str = "hydra.run.dir") -> Iterator[None]:
    """Print an error that a user can fix as one line and exit with 2; debug=true shows the traceback.

    `outside`, `folder`: see `messages.one_line`.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        print(error if error.args else "interrupted", file=sys.stderr)
        sys.exit(signals.EXIT_CODE if isinstance(error, signals.Stopped) else 130)
    except Exception as error:
        if any(re.fullmatch(r"\+*debug=(true|1|yes|on)", argument, re.IGNORECASE) for argument in sys.argv):
            raise
        from anomalib_lite.cli.messages import one_line

        line = one_line(error, outside, folder)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


def _parse_arguments() -> None:
    """Check the arguments with Hydra's own parsers, whose reports of a mistake are a page or a traceback.

    Flags may stand anywhere among the overrides: they are moved to the front, since Hydra wants all overrides together.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from anomalib_lite.cli.values import as_typed

    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser.error = error  # type: ignore[method-assign]
    try:
        known, unknown = parser.parse_known_intermixed_args()
    except argparse.ArgumentError as fault:
        raise UserError(f"{fault}; see --help") from fault
    if unknown := [argument for argument in unknown if argument.startswith("-")]:
        raise UserError(f"{' '.join(unknown)}: no such argument; options are KEY=VALUE, see --help")
    modes = [f"--{mode}" for mode in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(known, mode)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: give one of them")
    if known.config_dir and not Path(known.config_dir).is_dir():
        raise UserError(f"--config-dir {known.config_dir}: no such folder")
    if known.resolve and not (known.cfg or known.help):
        raise UserError("--resolve: goes with --cfg job")
    overrides = list(map(as_typed, known.overrides))
    for override in OverridesParser.create().parse_overrides(overrides):
        name = override.key_or_group
        is_value = override.value() is None or isinstance(override.value(), int | float | dict)
        if is_value and not override.is_delete() and (not name or (HOME / "conf" / name).is_dir()):
            raise UserError(f"{override.input_line}: {name or 'an option'} takes the name of a choice; see --help")
    flags = [argument for argument in sys.argv[1:] if argument not in known.overrides]
    sys.argv[1:] = [*flags, *overrides]
