"""Hydra's entry points to anomalib_lite/sweeps: the launchers of a sweep's jobs, and the sweepers that search.

Their options lie in conf/hydra/launcher and conf/hydra/sweeper. Nothing heavy is imported here: Hydra imports this file
for every --help.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper

from anomalib_lite.paths import HOME

IMBALANCES = (10, 20, 50, 100, 200, 500)


class ProcessesLauncher(Launcher):
    """Every job in a process of its own, which the class `sweep_name` of anomalib_lite/sweeps starts.

    The YAML files pass it, and the `sampler` of SearchSweeper, in `_args_`: they are no options for users.
    """

    def __init__(self, sweep_name: str = "sweep.Sweep", /, **options: Any) -> None:
        self.sweep_name, self.options = sweep_name, options
        self.sweep: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from importlib import import_module

        module, _, name = self.sweep_name.partition(".")
        sweep_class = getattr(import_module(f"anomalib_lite.sweeps.{module}"), name)
        self.sweep = self.sweep or sweep_class(self.options, self.config, self.context.config_loader)
        return self.sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)


class SearchSweeper(Sweeper):
    """A search with Optuna. `random` draws all trials at once; `tpe` draws the next `n_jobs` trials when the previous
    ones have ended.
    """

    def __init__(self, sampler: str, /, params: dict[str, str] | None, **options: Any) -> None:
        self.sampler, self.params, self.options = sampler, params or {}, options

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from anomalib_lite.sweeps.search import search

        given = [f"{key}={value}" for key, value in self.params.items()]
        overrides = [*given, *arguments]
        return search(self.sampler, self.options, overrides, self.config, self.context.config_loader, self.launcher)


class OwnOptions(SearchPathPlugin):
    """Adapts Hydra's stored options to this package's programs; those of another program stay as they are.

    The schemas that hydra-submitit-launcher and hydra-ray-launcher register under the names of our options are removed.
    split=exp10 … split=step500 are added: the long tails `split=exp` and `split=step` with an imbalance.
    """

    def manipulate_search_path(self, search_path: Any) -> None:
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if not main or Path(main.removeprefix("file://")) != HOME / "conf":
            return
        store = ConfigStore.instance()
        for name in ("submitit_local", "submitit_slurm", "ray"):
            store.repo.get("hydra", {}).get("launcher", {}).pop(f"{name}.yaml", None)
        for profile, imbalance in itertools.product(("exp", "step"), IMBALANCES):
            node = {"defaults": [profile, "_self_"], "imbalance": imbalance}
            store.store(group="split", name=f"{profile}{imbalance}", node=node)
