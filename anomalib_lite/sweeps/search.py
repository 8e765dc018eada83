"""Random search: every trial is a job, its values drawn from what the command line or hydra.sweeper.params spans.

Bergstra and Bengio, "Random search for hyper-parameter optimization", JMLR 13 (2012). A value depends on seed, trial
and option alone: the same command draws the same trials, in whatever order its options stand, and more trials begin
with those of fewer.
"""

import json
import logging
import math
import random
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from anomalib_lite.errors import UserError
from anomalib_lite.paths import write_text

log = logging.getLogger(__name__)


def search(
    arguments: list[str], n_trials: int, seed: int | None, config: Any, context: Any, launcher: Any
) -> list[Any]:
    """Draw the trials, run them, tell the best one."""
    if n_trials < 1:
        raise UserError(f"hydra.sweeper.n_trials={n_trials}: give a whole number from 1")
    overrides = OverridesParser.create(config_loader=context.config_loader).parse_overrides(arguments)
    last = {override.get_key_element(): override for override in overrides}  # one key, one value: the last one given
    fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in last.items() if not o.is_sweep_override()]
    space = {key: Draw(override) for key, override in sorted(last.items()) if override.is_sweep_override()}
    if not space:
        raise UserError(
            "hydra/sweeper=random: nothing to search; give options several values, such as "
            "'method.optimizer.lr=tag(log, interval(1e-4, 1e-1))' or backbone.layers=[2],[2,3]"
        )
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    trials = draw(space, n_trials, stored_seed(folder) if seed is None else seed)
    if len(trials) < n_trials:
        log.info("random search: all %d combinations that there are", len(trials))
    OmegaConf.save(config, folder / "multirun.yaml")
    returns = launcher.launch([[*fixed, *named(trial)] for trial in trials], initial_job_idx=0)
    tell_best(folder, trials, returns, context, config)
    return returns


class Draw:
    """How a value of an option is drawn; gives it as the command line takes it."""

    def __init__(self, override: Override):
        value: Any = override.value()
        self.choices: list[str] | None = None
        if not isinstance(value, IntervalSweep):
            if "log" in value.tags:
                raise UserError(f"{override.input_line}: tag(log, …) goes with interval(low, high)")
            self.choices = list(override.sweep_string_iterator())
            return
        ends: list[Any] = [value.start, value.end]
        self.low, self.high = ends
        self.log = "log" in value.tags
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(f"{override.input_line}: give interval(low, high), with 0 < low under tag(log, …)")
        self.whole = isinstance(self.low, int)  # int(interval(1, 9)): both ends may come

    def __call__(self, number: random.Random) -> str:
        if self.choices is not None:
            return self.choices[int(number.random() * len(self.choices))]
        there, back = (math.log, math.exp) if self.log else (float, float)
        wide = 0.5 if self.whole else 0.0  # a whole number's share of the interval reaches half a step to both sides
        low, high = there(self.low - wide), there(self.high + wide)
        value = back(low + number.random() * (high - low))
        rounded = round(value) if self.whole else float(f"{value:.6g}")  # can be read in a table
        return repr(min(max(rounded, self.low), self.high))


def draw(space: Mapping[str, Callable[[random.Random], str]], n_trials: int, seed: int) -> list[dict[str, str]]:
    """Trials that differ, in the order in which they are drawn; fewer where there are no more."""
    trials: dict[str, dict[str, str]] = {}
    attempts = 0
    number = 0
    while len(trials) < n_trials and attempts < 100 + 30 * len(trials):  # one that is left is missed once in e^30
        trial = {key: one(random.Random(f"{seed} {number} {key}")) for key, one in space.items()}
        name = json.dumps(trial)
        attempts = attempts + 1 if name in trials else 0
        trials.setdefault(name, trial)
        number += 1
    return list(trials.values())


def named(trial: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in trial.items()]


def stored_seed(folder: Path) -> int:
    """The seed that the sweep in this folder has drawn for itself, or a new one."""
    file = folder / "sweeper.json"
    try:
        return int(json.loads(file.read_text())["seed"])
    except FileNotFoundError:
        seed = secrets.randbelow(2**32)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; give hydra.sweeper.seed=NUMBER, or another hydra.sweep.dir") from error
    if (folder / "sweep.json").exists():
        raise UserError(
            f"hydra.sweeper.seed=null: {folder} holds a sweep that was begun with a seed; give the same one"
        )
    write_text(file, json.dumps({"seed": seed}) + "\n")
    return seed


def tell_best(folder: Path, trials: list[dict[str, str]], returns: list[Any], context: Any, config: Any) -> None:
    """A line, and the file that Hydra's optimising sweepers leave."""
    measured = [(made.return_value, number) for number, made in enumerate(returns) if made.return_value is not None]
    if not measured:
        return
    value, number = max(measured, key=lambda pair: (pair[0], -pair[1]))
    best = trials[number]
    content = {"name": "random", "best_evaluated_params": best, "best_evaluated_result": value}
    OmegaConf.save(OmegaConf.create(content), folder / "optimization_results.yaml")
    log.info("best %s %.4f: %s", returns[number].cfg.objective, value, " ".join(named(best)))
