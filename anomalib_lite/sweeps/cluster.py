"""Sweeps whose jobs run elsewhere: on a SLURM cluster or on this machine through submitit, or on a Ray cluster.

A job is a `Command` in a fresh process, as with hydra/launcher=processes. All machines must see the sweep's folder,
which records what is finished. hydra-submitit-launcher and hydra-ray-launcher run the jobs inside a multirun instead:
the first failure discards the other results, nothing is resumed, and Lightning's ranks repeat the launcher's command.
"""

import importlib
import shutil
from typing import Any

from anomalib_lite.errors import UserError
from anomalib_lite.sweeps.engines import LocalJobs, RayJobs, SlurmJobs
from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.sweep import Sweep


class ClusterSweep(Sweep):
    """A sweep with a package that brings the jobs to their machines."""

    package_name = "submitit"

    def __init__(self, options: dict[str, Any], config: Any, loader: Any):
        super().__init__(options, config, loader)
        try:
            self.package = importlib.import_module(self.package_name)
        except ImportError as error:
            raise UserError(
                f"hydra/launcher={self.launcher}: the package {self.package_name} is missing; "
                "pip install 'anomalib-lite[sweep]'"
            ) from error

    def visible_gpus(self) -> list[str]:
        return []  # the jobs run on other machines, or Ray assigns the GPUs


class LocalSweep(ClusterSweep):
    """submitit on this machine, with the options of hydra/launcher=processes."""

    launcher = "submitit_local"
    visible_gpus = Sweep.visible_gpus

    def make_engine(self) -> Any:
        return LocalJobs(self)


class SlurmSweep(ClusterSweep):
    launcher = "submitit_slurm"

    def make_engine(self) -> Any:
        return SlurmJobs(self)

    def plan(self, batch: dict[str, list[str]], first: int) -> None:
        super().plan(batch, first)
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise UserError(
                "hydra/launcher=submitit_slurm: no sbatch and srun here; start the sweep on a node of the cluster, or "
                "try it with hydra/launcher=submitit_local"
            )

    def devices(self, hardware: dict[str, Any]) -> tuple[int, bool]:
        tasks, several = self.tasks(hardware), hardware["nodes"] > 1 or hardware["devices"] not in ("auto", 1)
        if several and hardware.get("ranks") != "slurm":
            raise UserError(
                f"hardware.devices={hardware['devices']} hardware.nodes={hardware['nodes']} with "
                "hydra/launcher=submitit_slurm: add hardware=slurm, whose ranks are SLURM's tasks"
            )
        return 0, tasks * hardware["nodes"] > 1

    def tasks(self, hardware: dict[str, Any]) -> int:
        """SLURM's tasks per node: one per device."""
        if hardware["devices"] != "auto":
            return hardware["devices"]
        if hardware.get("ranks") != "slurm":
            return 1
        return self.options["gpus_per_node"] or 1

    def limit(self, jobs: list[Job]) -> int:
        return self.options["jobs"]

    def threads(self, limit: int) -> int | None:
        return self.options["threads"] or self.options["cpus_per_task"]

    def resources(self, job: Job) -> dict[str, Any]:
        """What sbatch is asked for, under submitit's names."""
        hardware, tasks, options = job.plain["hardware"], self.tasks(job.plain["hardware"]), self.options
        gpus = options["gpus_per_node"]
        if gpus is None:
            gpus = 0 if hardware["accelerator"] == "cpu" else tasks
        more = ("partition", "qos", "account", "constraint", "gres", "setup", "signal_delay_s", "additional_parameters")
        asked = {key: options[key] for key in ("name", "timeout_min", "mem_gb", "cpus_per_task")}
        asked |= {"gpus_per_node": gpus, **{f"slurm_{key}": options[key] for key in more}}
        return {
            **{key: value for key, value in asked.items() if value},
            "nodes": hardware["nodes"],
            "tasks_per_node": tasks,
            "slurm_srun_args": self.srun_arguments(),
        }

    def srun_arguments(self) -> list[str]:
        """Else the other ranks wait for one that ended, rank 0 is ended in its evaluation because the others have left,
        and, from SLURM 22.05 on, a task gets one core."""
        cpus = self.options["cpus_per_task"]
        return ["--kill-on-bad-exit=1", "--wait=0", *[f"--cpus-per-task={cpus}"] * bool(cpus)]


class RaySweep(ClusterSweep):
    launcher, package_name = "ray", "ray"

    def make_engine(self) -> Any:
        return RayJobs(self)

    def devices(self, hardware: dict[str, Any]) -> tuple[int, bool]:
        self.check_one_node(hardware)
        if hardware["devices"] == "auto" and hardware["accelerator"] != "cpu" and self.options["gpus_per_job"] is None:
            raise UserError(
                "hardware.devices=auto with hydra/launcher=ray: give a number, Ray must reserve the devices"
            )
        return 0, hardware["devices"] not in ("auto", 1)

    def limit(self, jobs: list[Job]) -> int:
        return self.options["jobs"] or max(1, len(jobs))

    def threads(self, limit: int) -> int | None:
        return self.options["threads"] or self.options["cpus_per_job"]

    def resources(self, job: Job) -> dict[str, Any]:
        """What Ray reserves for a job, as arguments of ray.remote. Jobs that reserve none would all use GPU 0."""
        hardware, gpus = job.plain["hardware"], self.options["gpus_per_job"]
        if gpus is None:
            gpus = 0 if hardware["accelerator"] == "cpu" else hardware["devices"]
            if hardware["accelerator"] == "auto" and not self.package.cluster_resources().get("GPU"):
                gpus = 0
        return {"num_cpus": self.options["cpus_per_job"], "num_gpus": gpus, "max_retries": 0, **self.options["remote"]}
