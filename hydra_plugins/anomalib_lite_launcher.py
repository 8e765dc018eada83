"""hydra/launcher=processes: every job of a sweep in a process of its own; see anomalib_lite/sweep.py.

Nothing heavy is imported here: Hydra imports it for every --help too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


@dataclass
class ProcessesConf:
    _target_: str = "hydra_plugins.anomalib_lite_launcher.ProcessesLauncher"
    jobs: int | None = None  # at a time; null: one a GPU, else one
    gpus_per_job: int | None = None  # null: what hardware.devices asks for; 0: all jobs see all GPUs
    threads: int | None = None  # CPU threads of each job; null: the cores are shared out to the jobs


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="anomalib_lite")


class ProcessesLauncher(Launcher):
    def __init__(self, jobs: int | None, gpus_per_job: int | None, threads: int | None) -> None:
        self.options = {"jobs": jobs, "gpus_per_job": gpus_per_job, "threads": threads}
        self.sweep: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from anomalib_lite.sweeps.sweep import Sweep

        self.sweep = self.sweep or Sweep(self.options, self.config, self.context.config_loader)
        return self.sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)
