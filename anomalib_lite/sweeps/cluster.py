"""Sweeps whose jobs run elsewhere: on a SLURM cluster or on this machine through submitit, or on a Ray cluster.

A job is a `Command` in a fresh process, as with hydra/launcher=processes. All machines must see the sweep's folder,
which records what is finished. hydra-submitit-launcher and hydra-ray-launcher run the jobs inside a multirun instead:
the first failure discards the other results, nothing is resumed, and Lightning's ranks repeat the launcher's command.
"""

import contextlib
import importlib
import shutil
import time
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from anomalib_lite.sweeps.command import Command
from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.sweep import Sweep

POLL = 0.1  # seconds between looks at the jobs
QUEUED = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING")  # SLURM's states of a job that has not ended


class ClusterSweep(Sweep):
    """A sweep with a package that brings the jobs to their machines."""

    package_name = "submitit"

    def __init__(self, options: dict[str, Any], config: Any, loader: Any):
        known = OmegaConf.load(HOME / "conf" / "hydra" / "launcher" / f"{self.launcher}.yaml")
        if unknown := options.keys() - known.keys():
            raise UserError(f"hydra.launcher.{min(unknown)}: no such option of {self.launcher}; see --cfg hydra")
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
        for option, key, wanted in (("tasks_per_node", "devices", tasks), ("nodes", "nodes", hardware["nodes"])):
            given = self.options[option]
            if given is not None and given != wanted:
                raise UserError(
                    f"hydra.launcher.{option}={given} with hardware.{key}={wanted}: a task is a device's rank, so the "
                    f"numbers are the same; leave hydra.launcher.{option} out"
                )
        return 0, tasks * hardware["nodes"] > 1

    def tasks(self, hardware: dict[str, Any]) -> int:
        """SLURM's tasks per node: one per device."""
        if hardware["devices"] != "auto":
            return hardware["devices"]
        if hardware.get("ranks") != "slurm":
            return 1
        return self.options["tasks_per_node"] or self.options["gpus_per_node"] or 1

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
            "slurm_srun_args": ["--kill-on-bad-exit=1"],  # else the other ranks wait for one that ended
        }


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
        """What Ray reserves for a job, as arguments of ray.remote."""
        hardware, gpus = job.plain["hardware"], self.options["gpus_per_job"]
        if gpus is None:
            gpus = hardware["devices"] if hardware["accelerator"] == "gpu" else 0
        return {"num_cpus": self.options["cpus_per_job"], "num_gpus": gpus, "max_retries": 0, **self.options["remote"]}


# --- engines: start(), wait(), close() and `started`, as in ForkedJobs ---


class LocalJobs:
    """Jobs through submitit, on this machine."""

    grace = 15.0  # seconds in which cancelled jobs may end

    def __init__(self, sweep: Any):
        self.folder, self.options, self.gpus = sweep.folder / ".submitit", sweep.options, sweep.gpus
        self.submitit, self.sweep = sweep.package, sweep
        self.running: dict[int, tuple[Any, Job]] = {}
        self.started: dict[int, float] = {}

    def start(self, job: Job, command: Command) -> None:
        handle = self.submit(job, command)
        (job.folder / ".submitted").write_text(handle.job_id)
        self.running[job.number] = handle, job

    def submit(self, job: Job, command: Command) -> Any:
        if self.gpus:  # submitit hides them unless it is asked for some
            shown = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
            command = replace(command, environment=shown | command.environment)
        executor = self.submitit.LocalExecutor(self.folder / "%j")
        executor.update_parameters(timeout_min=self.options["timeout_min"])
        return executor.submit(command)

    def wait(self, seconds: float) -> dict[int, int]:
        ended: dict[int, int] = {}
        end = time.monotonic() + seconds
        while not ended and time.monotonic() < end:
            time.sleep(POLL)
            ended = {n: self.exit_code(handle, job) for n, (handle, job) in self.running.items() if handle.done()}
        for number in ended:
            del self.running[number]
        return ended

    def has_outcome(self, handle: Any) -> bool:
        return handle.paths.result_pickle.exists()

    def exit_code(self, handle: Any, job: Job) -> int:
        if self.has_outcome(handle):
            with contextlib.suppress(self.submitit.core.utils.UncompletedJobError):
                outcomes = handle.results()
                self.started[job.number] = time.monotonic() - max(outcome["seconds"] for outcome in outcomes)
                return next((outcome["code"] for outcome in outcomes if outcome["code"]), 0)
        append_error(job, f"submitit's job {handle.job_id} ended without a result ({handle.state})")
        return 1

    def close(self) -> None:
        """Cancel the jobs that still run, and wait for their end."""
        for handle, _ in self.running.values():
            handle.cancel(check=False)
        end = time.monotonic() + self.grace
        while time.monotonic() < end and any(not handle.done() for handle, _ in self.running.values()):
            time.sleep(POLL)
        self.running = {}


class SlurmJobs(LocalJobs):
    """Jobs through submitit, in SLURM's queue."""

    grace = 0.0  # SLURM ends them

    def submit(self, job: Job, command: Command) -> Any:
        try:
            retries = self.options["max_num_timeout"]
            executor = self.submitit.AutoExecutor(self.folder / "%j", cluster="slurm", slurm_max_num_timeout=retries)
            executor.update_parameters(**self.sweep.resources(job))
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise UserError(f"hydra/launcher=submitit_slurm: {str(error).splitlines()[0]}") from error
        file = job.folder / ".submitted"
        if file.is_file():  # a launcher that was killed may have left the job in the queue
            handle = executor.job_class(self.folder / "%j", file.read_text())
            if handle.state.partition(" ")[0] in QUEUED:
                return handle
        return executor.submit(command)

    def has_outcome(self, handle: Any) -> bool:
        return True  # the file may appear late on a shared file system; submitit waits for it


class RayJobs:
    """Jobs as Ray's tasks."""

    def __init__(self, sweep: Any):
        self.ray, self.resources = sweep.package, sweep.resources
        self.starts_ray = not self.ray.is_initialized()
        if self.starts_ray:
            self.ray.init(**sweep.options["init"])
        self.running: dict[Any, Job] = {}
        self.started: dict[int, float] = {}

    def start(self, job: Job, command: Command) -> None:
        self.running[self.ray.remote(**self.resources(job))(Command.__call__).remote(command)] = job

    def wait(self, seconds: float) -> dict[int, int]:
        ended: dict[int, int] = {}
        for handle in self.ray.wait(list(self.running), timeout=seconds)[0]:
            job = self.running.pop(handle)
            try:
                outcome = self.ray.get(handle)
                ended[job.number] = outcome["code"]
                self.started[job.number] = time.monotonic() - outcome["seconds"]
            except self.ray.exceptions.RayError as error:
                append_error(job, f"Ray: {str(error).strip().splitlines()[-1]}")
                ended[job.number] = 1
        return ended

    def close(self) -> None:
        for handle in self.running:
            self.ray.cancel(handle)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=10)
        self.running = {}
        if self.starts_ray:
            self.ray.shutdown()
            self.starts_ray = False


def append_error(job: Job, text: str) -> None:
    with job.output.open("a") as file:
        file.write(f"error: {text}\n")
