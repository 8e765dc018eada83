"""hydra/sweeper=random: trials drawn at random, see anomalib_lite/sweep_random.py; hydra/sweeper=tpe: Optuna's.

Nothing heavy is imported here: Hydra imports it for every --help too.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


@dataclass
class RandomConf:
    _target_: str = "hydra_plugins.anomalib_lite_sweeper.RandomSweeper"
    n_trials: int = 20  # a higher number goes on with a sweep: its first trials stay the same
    seed: int | None = 0  # null: drawn once, and kept in the sweep's folder
    params: dict[str, str] | None = (
        None  # what the command line adds to, such as {method.optimizer.lr: "interval(0.1, 1)"}
    )


ConfigStore.instance().store(group="hydra/sweeper", name="random", node=RandomConf, provider="anomalib_lite")


class RandomSweeper(Sweeper):
    def __init__(self, n_trials: int, seed: int | None, params: dict[str, str] | None) -> None:
        self.n_trials, self.seed, self.params = n_trials, seed, params or {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from anomalib_lite.sweeps.search import search

        given = [f"{key}={value}" for key, value in self.params.items()]
        return search([*given, *arguments], self.n_trials, self.seed, self.config, self.context, self.launcher)


class TPESweeper(Sweeper):
    """hydra-optuna-sweeper's, with a seed, and the right way up: its default minimises."""

    def __init__(self, n_trials: int, n_jobs: int, seed: int, n_startup_trials: int, params: Any) -> None:
        from anomalib_lite.errors import UserError

        for name, value in {"n_trials": n_trials, "n_jobs": n_jobs}.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"hydra.sweeper.{name}={value}: give a whole number from 1")
        if not isinstance(seed, int):
            raise UserError(f"hydra.sweeper.seed={seed}: give a whole number, or a sweep that stops can't go on")
        try:
            from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
            from optuna.samplers import TPESampler
        except ImportError as error:
            raise UserError(
                f"hydra/sweeper=tpe: {error}; pip install 'anomalib-lite[optuna]', or choose hydra/sweeper=random"
            ) from error
        warnings.filterwarnings("ignore", message=".*constant_liar.*experimental")
        sampler: Any = TPESampler(seed=seed, n_startup_trials=n_startup_trials, constant_liar=True)
        self.optuna = OptunaSweeper(
            sampler=sampler, direction="maximize", storage=None, study_name=None, n_trials=n_trials, n_jobs=n_jobs,
            max_failure_rate=0.0, search_space=None, custom_search_space=None, params=params,
        )  # fmt: skip

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.optuna.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        return self.optuna.sweep(arguments)
