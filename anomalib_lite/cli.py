"""What the programs share: where the configuration lies, and errors as one line. Imports nothing heavy."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from anomalib_lite.errors import UserError

PACKAGE = Path(__file__).resolve().parent
#: holds conf/ and experiments/: the package in a wheel, the checkout in an editable install
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def run(task: Callable[[Any], Any], config_name: str) -> None:
    """Compose the configuration from the command line and run `task(cfg)`; an error is one line, exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing its own report
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own method file is importable from the console script too
    import hydra

    with reported():
        _parse_arguments()
        hydra.main(version_base="1.3", config_path=str(HOME / "conf"), config_name=config_name)(task)()


def run_plain(task: Callable[[dict[str, Any]], None], usage: str | None) -> None:
    """The same for a program that takes KEY=VALUE alone: `task(options)` with values read as YAML."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((usage or "").strip())
        return
    with reported():
        options: dict[str, Any] = {}
        for argument in sys.argv[1:]:
            key, equals, text = argument.partition("=")
            if not equals or not key:
                raise UserError(f"{argument}: arguments are KEY=VALUE; see --help")
            options[key] = _yaml(key, text)
        task(options)


def _yaml(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text}: not a value that can be read") from error


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn errors that a user can mend into one line and exit code 2; debug=true shows the traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    debug = any(re.fullmatch(r"\+*debug=(true|1|yes|on)", argument, re.IGNORECASE) for argument in sys.argv)
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if debug:
            raise
        cause = next((e for e in _chain(error) if isinstance(e, UserError)), None)
        if cause is None and isinstance(error, OSError) and not _writing(error):
            raise  # not a folder that can't be written: a fault of ours, shown whole
        fail(_one_line(cause or error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def _parse_arguments() -> None:
    """Let Hydra's own parser look at the arguments first: its error is several lines of usage."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser.error = error  # type: ignore[method-assign]
    try:
        parser.parse_args()
    except argparse.ArgumentError as fault:
        raise UserError(f"{fault}; see --help") from fault


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _writing(error: OSError) -> bool:
    return bool(error.filename) and not isinstance(error, FileNotFoundError | ConnectionError | TimeoutError)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}; choose another folder with hydra.run.dir=DIR"
    text = str(error)
    if not isinstance(error, UserError):
        text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", text)  # OmegaConf's inner view
        text = re.sub(r"\nTo append to your config use (\S+)", r" (+KEY=VALUE adds a new one)", text)
        if error.__cause__ is not None and str(error.__cause__) not in text:
            text += f": {error.__cause__}"
    return re.sub(r"\s*\n\s*", " ", re.sub(r"\n\t", ", ", text).replace(":,", ":")).strip()
