"""Sweeps whose jobs run elsewhere: on a SLURM cluster or here through submitit, or on a Ray cluster.

As with hydra/launcher=processes a job is the command `python -m anomalib_lite.train …` in a fresh process, and the
sweep's folder, which all machines must see, says what is finished. hydra-submitit-launcher and hydra-ray-launcher run
the jobs inside a multirun instead: there the first failure discards what the others gave, nothing is resumed, and the
ranks that Lightning starts repeat the launcher's command line.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from anomalib_lite.sweeps.forks import RANK, die_with
from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.sweep import Sweep

POLL = 0.1  # seconds between looks at the jobs


class ClusterSweep(Sweep):
    """The same sweep over another engine, which `launcher` names."""

    def __init__(self, options: dict[str, Any], config: Any, loader: Any):
        there = OmegaConf.load(HOME / "conf" / "hydra" / "launcher" / f"{self.launcher}.yaml")
        if strange := options.keys() - there.keys():
            raise UserError(f"hydra.launcher.{min(strange)}: no such option of {self.launcher}; see --cfg hydra")
        super().__init__(options, config, loader)
        self.package = importable("ray" if self.launcher == "ray" else "submitit", self.launcher)

    def serving(self) -> Any:
        if self.server is None:
            engine = RayJobs if self.launcher == "ray" else SubmititJobs
            self.server = engine(self)
        return self.server


class LocalSweep(ClusterSweep):
    """submitit on this machine: what hydra/launcher=processes may, without its fork server."""

    launcher = "submitit_local"


class RaySweep(ClusterSweep):
    launcher = "ray"

    def visible_gpus(self) -> list[str]:
        return []  # Ray deals them out

    def devices(self, hardware: dict[str, Any]) -> tuple[int, bool]:
        self.one_node(hardware)
        if hardware["devices"] == "auto" and hardware["accelerator"] != "cpu" and self.options["gpus_per_job"] is None:
            raise UserError(
                "hardware.devices=auto with hydra/launcher=ray: give a number, Ray must know how many to keep"
            )
        several = hardware["devices"] not in ("auto", 1)
        return 0, several

    def limit(self, jobs: list[Job]) -> int:
        return self.options["jobs"] or max(1, len(jobs))

    def resources(self, job: Job) -> dict[str, Any]:
        """What Ray keeps for a job."""
        hardware, gpus = job.plain["hardware"], self.options["gpus_per_job"]
        if gpus is None:
            gpus = hardware["devices"] if hardware["accelerator"] == "gpu" else 0
        return {"num_cpus": self.options["cpus_per_job"], "num_gpus": gpus, "max_retries": 0, **self.options["remote"]}

    def threads(self, limit: int) -> int | None:
        return self.options["threads"] or self.options["cpus_per_job"]


class SlurmSweep(ClusterSweep):
    launcher = "submitit_slurm"

    def visible_gpus(self) -> list[str]:
        return []  # this machine's are not the nodes'

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
        """A node's: one a device."""
        if hardware["devices"] != "auto":
            return hardware["devices"]
        if hardware.get("ranks") != "slurm":
            return 1
        return self.options["tasks_per_node"] or self.options["gpus_per_node"] or 1

    def limit(self, jobs: list[Job]) -> int:
        return self.options["jobs"]

    def resources(self, job: Job) -> dict[str, Any]:
        """What sbatch is asked for, in submitit's words."""
        hardware = job.plain["hardware"]
        more = ("partition", "qos", "account", "constraint", "gres", "setup", "signal_delay_s", "additional_parameters")
        tasks = self.tasks(hardware)
        gpus = self.options["gpus_per_node"]
        if gpus is None:
            gpus = 0 if hardware["accelerator"] == "cpu" else tasks
        return {
            **{
                key: self.options[key]
                for key in ("name", "timeout_min", "mem_gb", "cpus_per_task")
                if self.options[key]
            },
            "nodes": hardware["nodes"],
            "tasks_per_node": tasks,
            **({"gpus_per_node": gpus} if gpus else {}),
            **{f"slurm_{key}": self.options[key] for key in more if self.options[key]},
            "slurm_srun_args": ["--kill-on-bad-exit=1"],  # or the other ranks wait for the one that is gone
        }

    def threads(self, limit: int) -> int | None:
        return self.options["threads"] or self.options["cpus_per_task"]


def importable(package: str, launcher: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"hydra/launcher={launcher}: the package {package} is missing; pip install 'anomalib-lite[sweep]'"
        ) from error


# --- the launcher's end: start(), wait() and close(), as workers.Server has them ---


class SubmititJobs:
    def __init__(self, sweep: ClusterSweep):
        self.sweep, self.began = sweep, dict[int, float]()
        self.running: dict[int, tuple[Any, Job]] = {}

    def start(self, job: Job, arguments: list[str], environment: dict[str, str]) -> None:
        folder, submitit = self.sweep.folder / ".submitit", self.sweep.package
        if self.sweep.gpus:  # of this machine; submitit shows none of them, unless asked for
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(self.sweep.gpus)} | environment
        command = Command(arguments, job.folder, job.output, environment)
        if isinstance(self.sweep, SlurmSweep):
            retries = self.sweep.options["max_num_timeout"]
            try:
                executor = submitit.AutoExecutor(folder / "%j", cluster="slurm", slurm_max_num_timeout=retries)
                executor.update_parameters(**self.sweep.resources(job))
            except (RuntimeError, ValueError, TypeError, NameError) as error:
                raise UserError(f"hydra/launcher=submitit_slurm: {str(error).partition(chr(10))[0]}") from error
            handle = self.queued(job, executor) or executor.submit(command)
        else:
            executor = submitit.LocalExecutor(folder / "%j")
            executor.update_parameters(timeout_min=self.sweep.options["timeout_min"])
            handle = executor.submit(command)
        (job.folder / ".submitted").write_text(handle.job_id)
        self.running[job.number] = handle, job

    def queued(self, job: Job, executor: Any) -> Any:
        """The job that a launcher which was killed has left in SLURM's queue."""
        file = job.folder / ".submitted"
        if not file.is_file():
            return None
        handle = executor.job_class(self.sweep.folder / ".submitit" / "%j", file.read_text())
        there = handle.state.partition(" ")[0] in ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING")
        return handle if there else None

    def wait(self, seconds: float) -> dict[int, int]:
        ended: dict[int, int] = {}
        end = time.monotonic() + seconds
        while not ended and time.monotonic() < end:
            time.sleep(POLL)
            for number, (handle, job) in self.running.items():
                if handle.done():
                    ended[number] = self.code(handle, job)
        for number in ended:
            del self.running[number]
        return ended

    def code(self, handle: Any, job: Job) -> int:
        local = isinstance(self.sweep, LocalSweep)
        if not (local and not handle.paths.result_pickle.exists()):
            with contextlib.suppress(self.sweep.package.core.utils.UncompletedJobError):
                outcomes = handle.results()
                self.began[job.number] = time.monotonic() - max(outcome["seconds"] for outcome in outcomes)
                return next((outcome["code"] for outcome in outcomes if outcome["code"]), 0)
        with job.output.open("a") as file:
            file.write(f"error: submitit's job {handle.job_id} ended without a result ({handle.state})\n")
        return 1

    def close(self) -> None:
        for handle, _ in self.running.values():
            handle.cancel(check=False)
        end = time.monotonic() + 15
        while isinstance(self.sweep, LocalSweep) and self.running and time.monotonic() < end:
            self.running = {n: (handle, job) for n, (handle, job) in self.running.items() if not handle.done()}
            time.sleep(POLL)
        self.running = {}


class RayJobs:
    def __init__(self, sweep: ClusterSweep):
        self.sweep, self.ray, self.began = sweep, sweep.package, dict[int, float]()
        self.ours = not self.ray.is_initialized()
        if self.ours:
            self.ray.init(**self.sweep.options["init"])
        self.running: dict[Any, Job] = {}

    def start(self, job: Job, arguments: list[str], environment: dict[str, str]) -> None:
        assert isinstance(self.sweep, RaySweep)
        command = Command(arguments, job.folder, job.output, environment)
        self.running[self.ray.remote(**self.sweep.resources(job))(Command.__call__).remote(command)] = job

    def wait(self, seconds: float) -> dict[int, int]:
        ended: dict[int, int] = {}
        for handle in self.ray.wait(list(self.running), timeout=seconds)[0]:
            job = self.running.pop(handle)
            try:
                outcome = self.ray.get(handle)
                ended[job.number] = outcome["code"]
                self.began[job.number] = time.monotonic() - outcome["seconds"]
            except self.ray.exceptions.RayError as error:
                with job.output.open("a") as file:
                    file.write(f"error: Ray: {str(error).strip().splitlines()[-1]}\n")
                ended[job.number] = 1
        return ended

    def close(self) -> None:
        for handle in self.running:
            self.ray.cancel(handle)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=10)
        if self.ours:
            self.ray.shutdown()


# --- on the machine that a job runs on ---


class Command:
    """A job's command as a process of its own; submitit and Ray call it, and get {"code", "seconds"}."""

    def __init__(self, arguments: list[str], folder: Path, output: Path, environment: dict[str, str]):
        self.arguments, self.folder, self.output, self.environment = arguments, folder, output, environment
        self.home = Path.cwd()  # paths are relative to it, and a user's method lies there

    def __call__(self) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if key not in RANK} | self.environment
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        with self.alone(), self.output.open("ab") as output:
            resume = (self.folder / "checkpoints" / "config.json").is_file() and "resume=true" not in self.arguments
            parent = os.getpid()
            process = subprocess.Popen(
                [sys.executable, "-m", "anomalib_lite.train", *self.arguments, *["resume=true"] * resume],
                cwd=self.home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: die_with(parent),
            )
            try:
                code = process.wait()
            except BaseException:  # Ctrl-C, or the end of the time that was asked for
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
                raise
        return {"code": code, "seconds": time.time() - started}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process (the first rank) at a time in a run's folder: the job of a launcher that was killed may still
        work there, and the one started again waits for it."""
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and os.environ["SLURM_PROCID"] != "0":
            yield
            return
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def checkpoint(self) -> Any:
        """submitit asks when SLURM is about to end the job: it is queued again, and goes on."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)
