"""A search over options with Optuna, random or TPE: every trial is a job of the sweep.

Optuna's journal in the sweep's folder stores the trials. The sampler's seed depends only on the search's seed and the
trial's place among the distinct trials. So a search that was killed continues with the same trials, and a search with
more trials begins with those of fewer.
"""

import logging
import math
import random
import secrets
import warnings
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf

from anomalib_lite.errors import UserError
from anomalib_lite.runs.claim import claimed
from anomalib_lite.sweeps.job import check_known, check_whole
from anomalib_lite.sweeps.sweep import PATIENCE

log = logging.getLogger(__name__)
LOWEST = {"n_trials": 1, "n_jobs": 1, "n_startup_trials": 0}


def search(
    sampler: str, options: dict[str, Any], arguments: list[str], config: Any, loader: Any, launcher: Any
) -> list[Any]:
    """Run the trials, and name and store the best one.

    Args:
        sampler: random or tpe
        options: of the sweeper: n_trials, seed; for tpe also n_jobs and n_startup_trials
        arguments: overrides; those with several values or an interval span the space
    """
    check_known("sweeper", sampler, options)
    for name, low in LOWEST.items():
        check_whole(f"hydra.sweeper.{name}", options.get(name, low), low)
    check_whole("hydra.sweeper.seed", options["seed"], 0, optional=True)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    last = {override.get_key_element(): override for override in overrides}  # of several values the last one counts
    fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in last.items() if not o.is_sweep_override()]
    swept = {key: override for key, override in sorted(last.items()) if override.is_sweep_override()}
    if not swept:
        raise UserError(
            f"hydra/sweeper={sampler}: nothing to search; give options several values, such as "
            "'method.optimizer.lr=tag(log, interval(1e-4, 1e-1))' or backbone.layers=[2],[2,3]"
        )
    try:
        from optuna.storages.journal import JournalFileBackend  # noqa: F401  Optuna 4 or later has it
    except ImportError as error:
        raise UserError(f"hydra/sweeper={sampler}: {error}; pip install 'anomalib-lite[optuna]'") from error
    space = {key: distribution(override) for key, override in swept.items()}
    folder = Path(str(config.hydra.sweep.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "hydra.sweep.dir", ".searching", PATIENCE):
        trials = Trials(folder, sampler, options, space)
        OmegaConf.save(config, folder / "multirun.yaml")
        returns: list[Any] = []
        while new := trials.next_batch(len(returns)):
            returns += launcher.launch([[*fixed, *trial] for trial in new], initial_job_idx=len(returns))
            trials.tell([made.return_value for made in returns])
    sweep = getattr(launcher, "sweep", None)  # Hydra's own launchers have none: they end at the first failure
    if sweep:
        sweep.print_end()
    report_best(folder, sampler, trials.drawn(), returns)
    if sweep:
        sweep.exit_if_failed()
    return returns


def distribution(override: Override) -> Any:
    """What Optuna draws an option's values from: numbers, or the texts of the choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low: Any = value.start
        high: Any = value.end
        logarithmic = "log" in value.tags
        if not low < high or (logarithmic and low <= 0):
            raise UserError(f"{override.input_line}: give interval(low, high), with 0 < low under tag(log, …)")
        kind = IntDistribution if isinstance(low, int) else FloatDistribution  # int(interval(1, 9)): with both ends
        return kind(low, high, log=logarithmic)
    if "log" in value.tags:
        raise UserError(f"{override.input_line}: tag(log, …) goes with interval(low, high)")
    choices = list(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise UserError(f"{override.input_line}: no value, so the search has no trial; give at least one value")
    if isinstance(value, RangeSweep) and len(choices) > 1 and all(text.lstrip("-").isdigit() for text in choices):
        numbers = sorted(map(int, choices))
        return IntDistribution(numbers[0], numbers[-1], step=numbers[1] - numbers[0])
    return CategoricalDistribution(choices)


def as_text(value: Any, within: Any) -> str:
    """A drawn value as the command line takes it; numbers are rounded to six digits, which can be read in a table."""
    if not isinstance(value, float):
        return str(value)
    return repr(min(max(float(f"{value:.6g}"), within.low), within.high))


def number_of_values(values: Any) -> float:
    """How many values a distribution has."""
    if hasattr(values, "choices"):
        return len(values.choices)
    return (values.high - values.low) // values.step + 1 if isinstance(values.low, int) else math.inf


class Trials:
    """The trials in the journal of a sweep's folder.

    Raises:
        UserError: the journal can't be read or belongs to another search, or the folder holds a sweep without one
    """

    def __init__(self, folder: Path, sampler: str, options: dict[str, Any], space: dict[str, Any]):
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.sampler, self.options, self.space = optuna, sampler, options, space
        size = math.prod(map(number_of_values, space.values()))
        self.wanted = min(options["n_trials"], size)
        if size < options["n_trials"]:
            log.info("the search ends after all %d combinations", size)
        file = folder / "search.journal"
        if not (folder / "sweep.json").exists():
            file.unlink(missing_ok=True)  # of a search whose jobs were refused
        elif not file.exists():
            raise UserError(
                f"hydra.sweep.dir={folder}: holds a sweep without {file.name}, which is no search or one of an older "
                "version; choose another folder"
            )
        else:
            text = file.read_bytes()
            file.write_bytes(text[: text.rfind(b"\n") + 1])  # without a line that a crash cut off
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)  # of a process that was killed while it wrote
        try:
            storage = JournalStorage(JournalFileBackend(str(file)))
            self.study = optuna.create_study(
                study_name="search", storage=storage, direction="maximize", load_if_exists=True
            )
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{file}: damaged ({error}); choose another hydra.sweep.dir") from error
        self.check_settings(folder)
        distinct = {trial.number for trial in self.drawn().values()}
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished() and trial.number not in distinct:  # killed while it drew the trial
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def check_settings(self, folder: Path) -> None:
        """Store the sampler, its seed and the space, or compare them with the stored ones."""
        stored = self.study.user_attrs.get("settings", {})
        if self.options["seed"] is None:
            self.options["seed"] = stored.get("hydra.sweeper.seed", secrets.randbelow(2**32))
        to_json = self.optuna.distributions.distribution_to_json
        settings = {"hydra/sweeper": self.sampler, "hydra.sweeper.seed": self.options["seed"]}
        settings |= {key: to_json(values) for key, values in self.space.items()}
        if not stored:
            self.study.set_user_attr("settings", settings)
        for key in sorted(settings.keys() | stored.keys()) if stored else ():
            if stored.get(key) != settings.get(key):
                before = stored[key] if key.startswith("hydra") else "other values"
                raise UserError(
                    f"{key}: the search in {folder} was started with {before}; give the same, or choose another "
                    "hydra.sweep.dir"
                )

    def drawn(self) -> dict[tuple[str, ...], Any]:
        """{overrides: Optuna's trial} of the distinct trials, in the order in which they were drawn."""
        found: dict[tuple[str, ...], Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params.keys() == self.space.keys():
                found.setdefault(self.overrides(trial), trial)
        return found

    def overrides(self, trial: Any) -> tuple[str, ...]:
        return tuple(f"{key}={as_text(trial.params[key], within)}" for key, within in self.space.items())

    def next_batch(self, launched: int) -> list[tuple[str, ...]]:
        """The overrides of the trials to launch after the first `launched` ones; [] at the end of the search.

        The first batch of a resumed search holds all stored trials: the sweep knows which of them are done.
        """
        if launched >= self.wanted:
            return []
        together = self.options.get("n_jobs", self.wanted)
        known = list(self.drawn().values())
        finished = next((place for place, trial in enumerate(known) if not trial.state.is_finished()), len(known))
        end = min(self.wanted, (max(finished, launched) // together + 1) * together)
        self.draw(end)
        return list(self.drawn())[launched:end]

    def draw(self, number: int) -> None:
        """Draw until there are `number` distinct trials. A combination that is drawn again is skipped."""
        known, repeats = set(self.drawn()), 0
        samplers = self.optuna.samplers
        while len(known) < number:
            seed = random.Random(f"{self.options['seed']} {len(known)} {repeats}").getrandbits(32)
            if self.sampler == "random" or repeats:  # TPE could propose the same combination for ever
                self.study.sampler = samplers.RandomSampler(seed)
            else:
                with warnings.catch_warnings(category=self.optuna.exceptions.ExperimentalWarning, action="ignore"):
                    self.study.sampler = samplers.TPESampler(
                        seed=seed, n_startup_trials=self.options["n_startup_trials"], constant_liar=True
                    )
            trial = self.study.ask(self.space)
            if (overrides := self.overrides(trial)) in known:
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                repeats += 1
            else:
                known.add(overrides)
                repeats = 0

    def tell(self, values: list[float | None]) -> None:
        """Store the objectives of the first trials. A trial without one stays open: the next command may retry it."""
        for trial, value in zip(self.drawn().values(), values, strict=False):
            if value is not None and not trial.state.is_finished():
                self.study.tell(trial.number, value)


def report_best(folder: Path, sampler: str, trials: dict[tuple[str, ...], Any], returns: list[Any]) -> None:
    """Log the best trial, and write it to optimization_results.yaml as Hydra's own optimising sweepers do."""
    measured = [(made.return_value, number) for number, made in enumerate(returns) if made.return_value is not None]
    if not measured:
        return
    value, number = max(measured, key=lambda pair: (pair[0], -pair[1]))
    best = list(trials)[number]
    parameters = dict(override.split("=", 1) for override in best)
    content = {"name": sampler, "best_evaluated_params": parameters, "best_evaluated_result": value}
    OmegaConf.save(OmegaConf.create(content), folder / "optimization_results.yaml")
    log.info("best %s %.4f: %s", returns[number].cfg.objective, value, " ".join(best))
