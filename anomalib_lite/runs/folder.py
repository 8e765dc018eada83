"""A run's folder: every file and folder name, whether it is new, resumed or refused, and what it stores of the run.

Imports nothing heavy.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli.keys import assign, each_value, flat, lookup, method_defaults, overridden_key, reapply, translate
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME, write_text
from anomalib_lite.runs import inputs, own_modules

#: written by a finished run or by `evaluate`
RESULT = "result.json"
SCORES = "scores.csv"
MAPS = "maps.npz"
FIGURES = "figures"
TRAINING_FIGURE = "training.png"  # below FIGURES
DATA_PICTURE = "data.png"  # of data.check=only
#: written while a run trains
METRICS_LOG = "metrics.csv"
CHECKPOINTS = "checkpoints"
HYDRA = ".hydra"
WANDB = "wandb"
LOG = "train.log"  # by hydra.job.name
CLAIM = ".running"  # names the process that works in the folder, see `claim`
#: written by `predict`, beside SCORES
HEATMAPS = "heatmaps"
OVERLAYS = "overlays"
REPORT = "report.html"
WATCH = "watch.json"  # what a folder is watched with
#: keys of the configuration that say where images, masks or their table are
PLACES = ("data.root", "data.normal", "data.normal_test", "data.abnormal", "data.masks", "data.table")


def checkpoint(run: Path) -> Path:
    """The file of the last checkpoint."""
    return run / CHECKPOINTS / "last.ckpt"


def stored_config(run: Path) -> Path:
    """The file with the run's resolved configuration; a folder with this file holds a run."""
    return run / CHECKPOINTS / "config.json"


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return stored_config(folder).is_file()


def is_finished(run: Path) -> bool:
    """Whether the run has all its results. An incomplete result.json lacks costs, figures or logged results."""
    try:
        return json.loads((run / RESULT).read_text()).get("complete", True) is not False
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):  # damaged: reported where it is read
        return True


def make_absolute(config: dict[str, Any]) -> None:
    """Replace paths by absolute ones: a stored run is used later, from any folder."""
    backbone = config["backbone"]
    for key in PLACES:
        if places := lookup(config, key):
            assign(config, key, absolute_places(places))
    for split in (config["split"], config["data"]["split"]):
        if isinstance(split, dict) and isinstance(split.get("path"), str):
            split["path"] = absolute_places(split["path"])
    backbone["name"] = inputs.with_absolute_path("backbone.name", backbone["name"])
    if (backbone.get("weights") or "none") not in ("auto", "none"):
        backbone["weights"] = absolute_places(backbone["weights"])


def absolute_places(value: Any) -> Any:
    """A path, or each path of a list, as an absolute one. What is no text, and the empty text, stay as they are."""

    def absolute(path: Any) -> Any:
        return str(Path(path).expanduser().absolute()) if path and isinstance(path, str) else path

    return each_value(value, absolute)


# --- started: new, resumed, or refused ---


def open_run(run: Path, config: dict[str, Any], names: dict[str, str], overrides: Sequence[str], hydra: Any) -> bool:
    """Write the configuration into the run's folder; False if the run to be resumed is finished already.

    Args:
        config: the resolved configuration.
        names: its choices of `method` and `split`.
        overrides: the command line.
        hydra: Hydra's own configuration.

    Raises:
        UserError: the folder holds a run, and `resume` is false.
    """
    from omegaconf import OmegaConf

    if (is_run(run) or is_finished(run)) and not config["resume"]:
        raise UserError(f"{run} already holds a run: add resume=true to continue it, or choose another hydra.run.dir")
    if is_run(run):  # once more: another process may have been here since `resumed`
        check_unchanged(read_config(run)[0], config, run)
    digests = inputs.digests(config, stored_digests(run) if checkpoint(run).is_file() else {})
    if is_finished(run):
        return False
    (run / CHECKPOINTS).mkdir(exist_ok=True)
    (run / HYDRA).mkdir(exist_ok=True)
    stored = {"config": config, "names": names, "digests": digests, "modules": own_modules.places(config)}
    write_text(stored_config(run), json.dumps(stored, indent=1))
    for name, content in (("config", config), ("hydra", {"hydra": hydra}), ("overrides", list(overrides))):
        write_text(run / HYDRA / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    return True


def resumed(
    run: Path, config: dict[str, Any], names: dict[str, str], overrides: list[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Configuration, names and command line of a run started with `resume=true`; arguments: as the command line says.

    The command line is either repeated in full, or it chooses no group but hardware and logger. Then what it leaves out
    comes from the stored run, so that `resume=true hydra.run.dir=DIR` is enough.

    Raises:
        UserError: a key has another value than in the stored run and may not change on resume; or the command line
            holds nothing but such keys, and the folder no run.
    """
    from anomalib_lite.cli.schema import is_free

    def is_choice(key: str) -> bool:  # of a group, such as method=ssae or +experiments=demo
        return "." not in key and isinstance(config.get(key, {}), dict)

    keys = [overridden_key(override) for override in overrides]
    bound = [key for key in keys if not is_free(key, "resume")]
    if not is_run(run):
        if bound:  # a run that was killed before it wrote anything starts from the beginning
            return config, names, overrides
        raise UserError(
            f"hydra.run.dir={run}: no run to resume in this folder; fix the path, or repeat the whole command line"
        )
    stored, stored_names = read_config(run)
    own_modules.make_importable(stored, _stored(run, "modules"))
    if not any(is_choice(key) for key in bound):
        groups = {key: copy.deepcopy(lookup(config, key)) for key in keys if (HOME / "conf" / key).is_dir()}
        given, config, names = config, copy.deepcopy(stored) | groups, stored_names
        remaining = [each for each in _stored_overrides(run) if overridden_key(each) not in keys]
        overrides = reapply(remaining, stored, config, groups) + overrides
        for key in keys:
            if key not in groups:
                assign_everywhere(config, key, lookup(given, key))
    check_unchanged(stored, config, run)
    return config, names, overrides


def check_unchanged(stored: dict[str, Any], config: dict[str, Any], run: Path) -> None:
    """Raise UserError for the first key whose value differs from the stored one and may not change on resume.

    A path that has moved must lead to the same content; the fingerprint in a checkpoint tells what a split left.
    """
    from anomalib_lite.cli.schema import is_free, names_to_text

    names_to_text(stored)  # earlier versions stored a category called 3 as a number
    digests = stored_digests(run)
    for key, before, after in differences(stored, config, "resume"):
        if is_free(key, "moved"):
            if not (key == "split.path" and before and after and checkpoint(run).is_file()):
                inputs.check_moved(key, before, after, digests)
            continue
        raise UserError(
            f"{key}={after} but the run in {run} was started with {before}: "
            "resume with the same configuration, or start a new run in another folder"
        )


def differences(before: dict[str, Any], after: dict[str, Any], *where: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value after) of the keys that differ and may not change there (see schema.Key.free)."""
    from anomalib_lite.cli.schema import defaults, is_free

    one, two = (defaults() | flat(config) for config in (before, after))
    if any(key.startswith("method.") for key in one.keys() ^ two.keys()):  # options that the method got since then
        one, two = (method_defaults(each.get("method._target_")) | each for each in (one, two))
    for key in sorted(key for key in one.keys() | two.keys() if not key.startswith("data.split.")):  # as `split`
        if one.get(key) != two.get(key) and not any(is_free(key, place) for place in where):
            yield key, one.get(key), two.get(key)


def assign_everywhere(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key's value, also in the data's copy of the split."""
    assign(config, key, value)
    if key.startswith("split.") and isinstance(config["data"].get("split"), dict):
        assign(config, f"data.{key}", value)


def holds_only_a_start(run: Path) -> bool:
    """Whether the folder holds nothing but what a start writes before the first batch."""
    log = run / METRICS_LOG
    trained = log.is_file() and len(log.read_text().splitlines()) > 1
    return not trained and {each.name for each in run.iterdir()} <= {HYDRA, CHECKPOINTS, LOG, METRICS_LOG, WANDB, CLAIM}


def withdraw(run: Path) -> None:
    """Undo `open_run` for a start that failed before the first checkpoint, so that a corrected run may use the folder;
    a folder with logged batches is left for its reader.
    """
    stored_config(run).unlink(missing_ok=True)
    if holds_only_a_start(run):
        for file in (run / LOG, run / METRICS_LOG):
            file.unlink(missing_ok=True)
        for part in (HYDRA, WANDB):
            shutil.rmtree(run / part, ignore_errors=True)
        with contextlib.suppress(OSError):
            (run / CHECKPOINTS).rmdir()


# --- stored ---


def read_config(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved configuration of a run, with today's names, and its choices of `method` and `split`.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = stored_config(run)
    try:
        content = json.loads(file.read_text())
        return translate(content["config"]), content["names"]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; is run={run} the folder of a finished run?") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); train again") from error


def stored_digests(run: Path) -> dict[str, str]:
    """The hashes of the run's split list and weights, see `inputs`."""
    return _stored(run, "digests")


def read_run(run: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """The checkpoint's file, configuration and names of a trained run; UserError where one is missing or damaged."""
    if not run.is_dir():
        raise UserError(f"run={run}: no such folder")
    config, names = read_config(run)
    if not checkpoint(run).is_file():
        raise UserError(f"{checkpoint(run)}: no such file; is run={run} the folder of a finished run?")
    own_modules.make_importable(config, _stored(run, "modules"))
    return checkpoint(run), config, names


def _stored(run: Path, name: str) -> dict[str, str]:
    """What the run's file of the configuration holds beside it; empty for a run of an earlier version."""
    try:
        return dict(json.loads(stored_config(run).read_text()).get(name, {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _stored_overrides(run: Path) -> list[str]:
    """The command line of a stored run; empty where it is missing."""
    import yaml

    try:
        return [str(each) for each in yaml.safe_load((run / HYDRA / "overrides.yaml").read_text(encoding="utf-8"))]
    except (OSError, TypeError, yaml.YAMLError):
        return []
