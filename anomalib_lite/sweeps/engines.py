"""What brings a sweep's jobs to their machines: submitit, SLURM through submitit, Ray.

Each engine has start(), wait(), close() and `started`, as `forks.ForkedJobs` has.
"""

import contextlib
import io
import logging
import os
import time
from dataclasses import replace
from typing import Any

from anomalib_lite.errors import UserError
from anomalib_lite.sweeps.command import Command
from anomalib_lite.sweeps.job import Job

log = logging.getLogger(__name__)
ASK = 60.0  # seconds between two questions to SLURM about its jobs, and before a refused job is submitted again
QUEUED = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING")  # SLURM's states of a job that has not ended


class LocalJobs:
    """Jobs through submitit, on this machine."""

    grace = 15.0  # seconds in which cancelled jobs may end
    poll = 0.1  # seconds between looks at the jobs

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
            time.sleep(self.poll)
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
            time.sleep(self.poll)
        self.running = {}


class SlurmJobs(LocalJobs):
    """Jobs through submitit, in SLURM's queue."""

    grace = 0.0  # SLURM ends them
    poll = 5.0  # each look reads and writes some files per job, for days, on a login node
    asked = 0.0

    def __init__(self, sweep: Any):
        super().__init__(sweep)
        self.refused: list[tuple[Job, Command]] = []  # as at a limit of submitted jobs; they are submitted again
        self.tried = 0.0

    def start(self, job: Job, command: Command) -> None:
        if self.refused or not self.is_accepted(job, command):
            self.refused.append((job, command))

    def is_accepted(self, job: Job, command: Command) -> bool:
        """Submit a job, which SLURM may refuse. UserError if no job of this sweep is queued or running then."""
        self.tried = time.monotonic()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints sbatch's reason each time
                super().start(job, command)
        except self.submitit.core.utils.FailedJobError as error:
            for file in self.folder.iterdir():  # submitit leaves the files of the refused job
                if file.is_file() and not file.is_symlink():
                    file.unlink()
            text = " ".join(str(error).split())
            if not self.running:
                raise UserError(f"hydra/launcher=submitit_slurm: {text}") from error
            if not self.refused:
                log.warning("the remaining jobs are submitted as soon as SLURM accepts them: %s", text)
            return False
        return True

    def wait(self, seconds: float) -> dict[int, int]:
        """As on this machine. A job that was killed leaves no file: SLURM is asked for all jobs together."""
        if self.running and time.monotonic() - self.asked > ASK:
            next(iter(self.running.values()))[0].watcher.update()
            self.asked = time.monotonic()
        if self.refused and time.monotonic() - self.tried > ASK:
            while self.refused and self.is_accepted(*self.refused[0]):
                self.refused.pop(0)
        ended = super().wait(seconds)
        if ended and not self.running:  # SLURM counts the last ones against a limit for some more seconds
            self.tried = time.monotonic()
        return ended

    def submit(self, job: Job, command: Command) -> Any:
        try:
            retries = self.options["max_num_timeout"]
            executor = self.submitit.AutoExecutor(self.folder / "%j", cluster="slurm", slurm_max_num_timeout=retries)
            executor.update_parameters(**self.sweep.resources(job))
            command = replace(command, grace=max(1.0, (self.options["signal_delay_s"] or 15) - 10))  # then requeued
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
            self.connect(sweep.options["init"])
        if not self.ray.cluster_resources().get("GPU"):
            log.info("Ray has no GPU here: jobs with hardware.accelerator=auto run on CPUs")
        self.running: dict[Any, Job] = {}
        self.started: dict[int, float] = {}

    def connect(self, options: dict[str, Any]) -> None:
        """Start Ray, or connect to the cluster at the option `address` or at $RAY_ADDRESS."""
        given = options.get("address") or os.environ.get("RAY_ADDRESS", "null")
        try:
            self.ray.init(**options)
        except ConnectionError as error:
            raise UserError(
                f"hydra.launcher.init.address={given}: no Ray cluster answers ({error}); start one with "
                "`ray start --head`, or leave the address out"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise UserError(f"hydra.launcher.init: {error}") from error

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
