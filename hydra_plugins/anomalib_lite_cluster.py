"""hydra/launcher=submitit_local, submitit_slurm and ray: a sweep's jobs elsewhere; see anomalib_lite/sweep_cluster.py.

Their options lie in conf/hydra/launcher/. Nothing heavy is imported here: Hydra imports it for every --help too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin

from anomalib_lite.paths import HOME


class ClusterLauncher(Launcher):
    kind = ""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.sweep: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from anomalib_lite.sweeps import cluster as sweep_cluster

        kind = getattr(sweep_cluster, self.kind)
        self.sweep = self.sweep or kind(self.options, self.config, self.context.config_loader)
        return self.sweep.launch([list(overrides) for overrides in job_overrides], initial_job_idx)


class SubmititLocalLauncher(ClusterLauncher):
    kind = "LocalSweep"


class SubmititSlurmLauncher(ClusterLauncher):
    kind = "SlurmSweep"


class RayLauncher(ClusterLauncher):
    kind = "RaySweep"


class OwnOptions(SearchPathPlugin):
    """hydra-submitit-launcher and hydra-ray-launcher bring schemas under the same names; here they are not in force."""

    def manipulate_search_path(self, search_path: Any) -> None:
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if main and Path(main.removeprefix("file://")) == HOME / "conf":  # no other program's
            stored = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
            for name in ("submitit_local", "submitit_slurm", "ray"):
                stored.pop(f"{name}.yaml", None)
