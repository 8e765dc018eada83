"""Errors of Hydra, OmegaConf and the operating system as one line: it begins with the option, ends with the cure."""

import difflib
import errno
import re
import sys
from collections.abc import Iterator
from typing import Any

from anomalib_lite.cli.keys import RENAMED, new_name
from anomalib_lite.errors import UserError


def one_line(error: BaseException, outside: bool, folder: str) -> str | None:
    """The line for an error that a user can fix; None for an error of ours.

    Args:
        outside: whether the error comes from outside a run's computation: every OSError is then about a folder.
        folder: the option that names the folder of the results.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return "~: no home folder is known here; set HOME, or give paths without ~"
    if not isinstance(error, UserError | HydraException | OmegaConfBaseException | YAMLError | OSError):
        return None
    cause = next((each for each in _chain(error) if isinstance(each, UserError)), None)
    if isinstance(error, OSError) and not (cause or outside or isinstance(error, HydraException) or _is_writing(error)):
        return None  # Hydra's error for a missing choice is an OSError too
    return re.sub(r"\s*\n\s*", " ", _text(cause or error, folder)).strip()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_writing(error: OSError) -> bool:
    """Whether a file could not be written: the disk is full, or the folder is not writable."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(error.filename) and not isinstance(error, FileNotFoundError | ConnectionError | TimeoutError)


def _text(error: BaseException, folder: str) -> str:
    """The option and the cure, where the messages of Hydra and OmegaConf show their internals."""
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
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'\n", str(error)):
        return _several_values(ambiguous[1])
    if isinstance(error, errors.InstantiationException):
        return _not_made(error)
    if isinstance(error, OSError):
        place = error.filename or "the folder of the results"
        return f"{place}: {error.strerror or error}; fix the path, or choose another folder with {folder}=DIR"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _missing_option(cause)
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", str(error))
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in text:
        text = f"{error.full_key}: {text}"
    if isinstance(cause, OmegaConfBaseException):
        text += ": " + str(cause).partition("\n")[0]
    return text


def _missing_choice(error: Any) -> str:
    """`method=foo`, with the choices of the group."""
    if not error.missing_cfg_file or "/" not in error.missing_cfg_file:
        return str(error).partition("\n")[0]  # the primary configuration
    group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
    choices = [option for option in error.options or () if not option.startswith("_")]
    advice = f"choose from {', '.join(choices)}" if choices else f"no searched folder holds {group}/{name}.yaml"
    return f"{group}={name}: no such choice; {advice} (--config-dir DIR adds your own folder)"


def _missing_option(error: Any) -> str:
    """`data.foo`, with a similar option, or the group's options."""
    key, parent = str(error.full_key or error.key), error.parent_node
    if key in RENAMED:
        return new_name(key)
    group = key.rpartition(".")[0]
    options = [str(name) for name in parent or () if not str(name).startswith("_")]
    near = difflib.get_close_matches(key.rpartition(".")[2], options, n=1)
    if near:
        advice = f"did you mean {f'{group}.{near[0]}'.strip('.')}?"
    else:
        advice = f"{group or 'the configuration'} has {', '.join(options)}" if options else "see --cfg job"
    return f"{key}: no such option; {advice} (+{key}=VALUE adds one)"


def not_located(target: str, error: BaseException) -> str:
    """A `_target_` that can't be imported, with a similar name of its module. `error`: of Hydra, when it looked."""
    module, _, name = target.rpartition(".")
    cause, advice = error.__cause__ or error, ""
    reason = f"{type(cause).__name__}: {cause}"
    if holder := sys.modules.get(module):
        names = [each for each, value in vars(holder).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1)
        reason, advice = f"{module} has no {name}", f"did you mean {module}.{near[0]}? " if near else ""
    return (
        f"{target}: can't be imported ({reason}); {advice}check _target_ and the file that it names (the current "
        "folder and PYTHONPATH are searched; debug=true shows the traceback)"
    )


def _several_values(override: str) -> str:
    """KEY=a,b without --multirun: Hydra takes the comma for that of a sweep."""
    from anomalib_lite.cli.schema import types_of

    key, _, text = override.partition("=")
    plain = text.replace('"', "").replace("'", "")  # `values.as_typed` has put quotes around the parts
    forms, types = [], types_of(key.lstrip("+"))
    if str in types:
        forms.append(f"one value with a comma needs quotes: '{key}=\"{plain}\"'")
    if list in types:
        forms.append(f"a list needs brackets: '{key}=[{plain}]'")
    forms.append("a sweep over the values needs --multirun (-m)")
    return f"{key}={plain}: several values; {'; '.join(forms)}"


def _not_made(error: BaseException) -> str:
    """A `_target_` that can't be imported, or that refuses its options."""
    for inner in _chain(error):
        if type(inner) is type(error):
            error = inner  # the innermost: it names the target that failed
    cause = error.__cause__
    found = re.match(r"Error .*?(?:'|\()([\w.]+)", str(error))
    if cause is None or not found:
        return str(error)
    if "locating" in str(error):
        return not_located(found[1], cause)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if unexpected and f"method.{unexpected[1]}" in RENAMED:
        return new_name(f"method.{unexpected[1]}")
    return (
        f"{found[1]}: can't be made from its options ({type(cause).__name__}: {cause}); check their values, or see "
        "the traceback with debug=true"
    )
