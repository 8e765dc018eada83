"""What the programs share: where the configuration lies, and errors as one line. Imports nothing heavy."""

import argparse
import contextlib
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME


def run(task: Callable[[Any], Any], config_name: str) -> None:
    """Compose the configuration from the command line and run `task(cfg)`; an error is one line, exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing its own report
    _wait_quietly()
    import_from_here()
    import hydra

    @functools.wraps(task)
    def job(cfg: Any) -> Any:
        with reported():  # here already: Hydra would add a line of its own
            return task(cfg)

    with reported(outside=True):
        _parse_arguments()
        hydra.main(version_base="1.3", config_path=str(HOME / "conf"), config_name=config_name)(job)()


def run_plain(task: Callable[[dict[str, Any]], None], usage: str | None, texts: Sequence[str]) -> None:
    """The same for a program that takes KEY=VALUE alone: `task(options)` with values read as YAML, or as they are
    typed for the keys in `texts` (paths and names: a folder may be called 01, or no)."""
    _wait_quietly()
    import_from_here()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((usage or "").strip())
        return
    with reported(folder="output"):
        options: dict[str, Any] = {}
        for argument in sys.argv[1:]:
            key, equals, text = argument.partition("=")
            if not equals or not key:
                raise UserError(f"{argument}: arguments are KEY=VALUE; see --help")
            options[key] = text if key in texts else _yaml(key, text)
        task(options)


class Parser(argparse.ArgumentParser):
    """Of the programs that take flags: a mistake is a UserError."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def import_from_here() -> None:
    """A user's own method file is importable from the console scripts too."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _wait_quietly() -> None:
    """Before torch is imported: OpenMP's threads wait without spinning, or runs that share cores slow each other down
    a hundredfold."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _yaml(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text}: not a value that can be read") from error


@contextlib.contextmanager
def reported(outside: bool = False, folder: str = "hydra.run.dir") -> Iterator[None]:
    """Turn errors that a user can mend into one line and exit code 2; debug=true shows the traceback.

    `outside` of a job any OSError is one: it comes from the run's folder, which the option `folder` names.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    debug = any(re.fullmatch(r"\+*debug=(true|1|yes|on)", argument, re.IGNORECASE) for argument in sys.argv)
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError):  # `… | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        cause = next((e for e in _chain(error) if isinstance(e, UserError)), None)
        if cause is None and isinstance(error, OSError) and not (outside or _writing(error)):
            raise  # not a folder that can't be written: a fault of ours, shown whole
        fail(_one_line(cause or error, folder))
    except KeyboardInterrupt as error:
        print(error if error.args else "interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def _parse_arguments() -> None:
    """Let Hydra's own parsers look at the arguments first: what they say of a mistake is a page, or a traceback.

    Flags may stand anywhere among the overrides; Hydra wants all overrides together.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

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
    for override in OverridesParser.create().parse_overrides(known.overrides):
        name = override.key_or_group
        group = override.value() is None or isinstance(override.value(), int | float | dict)
        if group and not override.is_delete() and (not name or (HOME / "conf" / name).is_dir()):
            raise UserError(f"{override.input_line}: {name or 'an option'} takes the name of a choice; see --help")
    rest = list(known.overrides)
    flags = [argument for argument in sys.argv[1:] if argument not in rest]
    sys.argv[1:] = [*flags, *rest]


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _writing(error: OSError) -> bool:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return bool(error.filename) and not isinstance(error, FileNotFoundError | ConnectionError | TimeoutError)


def _one_line(error: BaseException, folder: str) -> str:
    return re.sub(r"\s*\n\s*", " ", _text(error, folder)).strip()


def _text(error: BaseException, folder: str) -> str:
    """What to tell of an error: the option and what to do, where Hydra and OmegaConf show their inner view."""
    from hydra import errors
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    cause = error.__cause__
    if isinstance(error, errors.MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, errors.OverrideParseException):
        why = error.message.partition("\nSee https")[0].splitlines()[-1].strip(" ^")
        return (
            f"{error.override}: can't be read{f' ({why})' * bool(why)}; options are KEY=VALUE, quote special "
            "characters: 'KEY=\"VALUE\"'"
        )
    if isinstance(error, errors.InstantiationException):
        return _not_made(error)
    if isinstance(error, OSError):
        place = error.filename or "the folder of the results"
        return f"{place}: {error.strerror or error}; mend the path, or choose another folder with {folder}=DIR"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _missing_option(cause)
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", str(error))
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in text:
        text = f"{error.full_key}: {text}"
    if isinstance(cause, OmegaConfBaseException):
        text += ": " + str(cause).partition("\n")[0]
    return text


def _missing_choice(error: Any) -> str:
    """`method=foo`, and what there is instead."""
    if not error.missing_cfg_file or "/" not in error.missing_cfg_file:
        return str(error).partition("\n")[0]  # the primary configuration
    group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
    there = [option for option in error.options or () if not option.startswith("_")]
    advice = f"choose from {', '.join(there)}" if there else f"no folder that is searched holds {group}/{name}.yaml"
    return f"{group}={name}: no such choice; {advice} (--config-dir DIR adds a folder of yours)"


def _missing_option(error: Any) -> str:
    """`data.foo`, and what there is instead."""
    key, parent = str(error.full_key or error.key), error.parent_node
    group = key.rpartition(".")[0]
    there = [str(name) for name in parent or () if not str(name).startswith("_")]
    near = difflib.get_close_matches(key.rpartition(".")[2], there, n=1)
    if near:
        advice = f"did you mean {f'{group}.{near[0]}'.strip('.')}?"
    else:
        advice = f"{group or 'the configuration'} has {', '.join(there)}" if there else "see --cfg job"
    return f"{key}: no such option; {advice} (+{key}=VALUE adds one)"


def _not_made(error: BaseException) -> str:
    """A `_target_` that can't be found, or that refuses its options."""
    for inner in _chain(error):
        if type(inner) is type(error):
            error = inner  # the innermost: it names the target that failed
    cause = error.__cause__
    found = re.match(r"Error .*?(?:'|\()([\w.]+)", str(error))
    if cause is None or not found:
        return str(error)
    if "locating" in str(error):
        cause = cause.__cause__ or cause
        return (
            f"{found[1]}: can't be imported ({type(cause).__name__}: {cause}); check _target_ and the file that it "
            "names (the current folder and PYTHONPATH are searched; debug=true shows the traceback)"
        )
    return (
        f"{found[1]}: can't be made from its options ({type(cause).__name__}: {cause}); check their values, or see "
        "the traceback with debug=true"
    )
