"""A sweep: its jobs in processes of their own, several at a time, over its folder that remembers which are finished.

A job is known by its overrides, whatever their order and its number. `sweep.json` in the sweep's folder holds which job
lies in which folder; whether it is finished, interrupted or failed is read off what the run left there.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, setup_globals
from omegaconf import OmegaConf, open_dict, read_write

from anomalib_lite.cli import schema as configuration
from anomalib_lite.errors import UserError
from anomalib_lite.paths import write_text
from anomalib_lite.sweeps import view as sweep_view
from anomalib_lite.sweeps.forks import Server
from anomalib_lite.sweeps.job import Job, arguments_of, before_now, entry_of, finish, key_of, returned, visible_gpus

log = logging.getLogger(__name__)
#: a launcher's options that are whole numbers, and from where
WHOLE = {
    "jobs": 1, "threads": 1, "gpus_per_job": 0, "cpus_per_job": 1, "timeout_min": 1, "nodes": 1, "tasks_per_node": 1,
    "gpus_per_node": 0, "cpus_per_task": 1, "mem_gb": 1, "signal_delay_s": 1, "max_num_timeout": 0,
}  # fmt: skip
PATIENCE = 30.0  # seconds that the jobs of a launcher that was killed may take to end


class Sweep:
    """What lives as long as the sweeper: one sweep may be launched in several batches."""

    launcher = "processes"

    def __init__(self, options: dict[str, Any], config: Any, loader: Any):
        for name in WHOLE.keys() & options.keys():
            value, low = options[name], WHOLE[name]
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise UserError(f"hydra.launcher.{name}={value}: give a whole number from {low}, or null")
        self.options, self.config, self.loader = options, config, loader
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.index = self.folder / "sweep.json"
        self.gpus = self.visible_gpus()
        self.jobs: dict[str, Job] = {}
        self.lock: int | None = None
        self.server: Any = None  # starts the jobs: see serving()

    def launch(self, job_overrides: list[list[str]], first: int) -> list[JobReturn]:
        """Run a batch of jobs; exits with 1 when one has failed, after all have ended."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked(), interruptible():
            keys = [key_of(overrides) for overrides in job_overrides]
            self.plan(dict(zip(keys, job_overrides, strict=True)), first)
            jobs = list({key: self.jobs[key] for key in keys}.values())
            try:
                self.work(jobs)
            except BaseException:
                self.end_server()
                for job in jobs:
                    job.state = "interrupted" if job.state == "running" else job.state
                sweep_view.say_interrupted(self.folder, jobs)
                raise
        if not self.batches():
            self.end_server()
        sweep_view.show(self.folder, list(self.jobs.values()))  # of earlier batches too
        if any(job.state == "failed" for job in jobs):
            self.end_server()
            sys.exit(1)
        return [returned(self.jobs[key]) for key in keys]

    def batches(self) -> bool:
        """Whether the sweeper may launch further ones."""
        sweeper = self.config.hydra.sweeper
        kind = str(sweeper._target_).rpartition(".")[2]
        return bool(sweeper.max_batch_size) if kind == "BasicSweeper" else kind != "RandomSweeper"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One sweep at a time in a folder. The server and its jobs hold the lock too: those of a launcher that was
        killed keep it until they have ended."""
        if self.lock is None:
            self.lock = os.open(self.folder, os.O_RDONLY)
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise UserError(
                        f"{self.folder}: another sweep works in it; wait for its end, or choose another hydra.sweep.dir"
                    ) from None
                time.sleep(0.1)
        try:
            yield
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    # --- which jobs there are, and where they lie ---

    def plan(self, batch: dict[str, list[str]], first: int) -> None:
        known = self.stored()
        if not self.jobs and known and not (known.keys() <= batch.keys() or batch.keys() <= known.keys()):
            strange = next(entry for key, entry in known.items() if key not in batch)
            raise UserError(
                f"{self.folder} holds another sweep, with the job {' '.join(strange['overrides'])}; repeat its "
                "command to go on with it, or choose another hydra.sweep.dir"
            )
        for number, (key, overrides) in enumerate(batch.items(), first):
            if key not in self.jobs:
                self.jobs[key] = self.job(overrides, number, known.get(key), known)
                known[key] = entry_of(self.jobs[key], self.folder)
        write_text(self.index, json.dumps({"jobs": list(known.values())}, indent=1) + "\n")

    def stored(self) -> dict[str, dict[str, Any]]:
        try:
            entries = json.loads(self.index.read_text())["jobs"]
            return {key_of(entry["overrides"]): entry for entry in entries}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.index}: damaged; choose another hydra.sweep.dir") from error

    def job(self, overrides: list[str], number: int, entry: Any, known: dict[str, dict[str, Any]]) -> Job:
        """A job with its folder and state: as stored, else the first number and folder that are free."""
        taken = {other["number"]: other["folder"] for other in known.values()}
        if entry:
            number = entry["number"]
        elif number in taken:
            number = max(taken) + 1
        cfg = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)  # for what refers to it
        try:
            subfolder = entry["folder"] if entry else str(cfg.hydra.sweep.subdir)
            with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
                cfg.hydra.runtime.output_dir = str(self.folder / subfolder)
            plain: Any = OmegaConf.to_container(
                OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True
            )
        finally:
            HydraConfig.instance().cfg = before
        if not entry and subfolder in taken.values():
            raise UserError(f"hydra.sweep.subdir: two jobs share the folder {subfolder}; name all that differs in it")
        configuration.check(plain)
        self.check_objective(plain)
        job = Job(number, overrides, self.folder / subfolder, cfg, plain, *self.devices(plain["hardware"]))
        before_now(job)
        return job

    def check_objective(self, plain: dict[str, Any]) -> None:
        """An optimising sweeper needs something to be told."""
        kind = str(self.config.hydra.sweeper._target_).rpartition(".")[2]
        if kind == "BasicSweeper" or (kind == "RandomSweeper" and plain["objective"] is None):
            return
        if str(self.config.hydra.sweeper.get("direction", "maximize")).rpartition(".")[2] != "maximize":
            raise UserError("hydra.sweeper.direction: of every objective more is better; give maximize")
        if plain["objective"] is None or plain["data"]["val_fraction"] == 0:
            raise UserError(
                f"hydra/sweeper: objective={plain['objective'] or 'null'} is measured on held-out training images, and "
                f"data.val_fraction={plain['data']['val_fraction']}; give objective=validation.image_auroc "
                "data.val_fraction=0.2"
            )

    def one_node(self, hardware: dict[str, Any]) -> None:
        if hardware.get("ranks") == "slurm":
            raise UserError(
                f"hardware=slurm with hydra/launcher={self.launcher}: SLURM starts these ranks; choose "
                "hydra/launcher=submitit_slurm, or hardware=ddp"
            )
        if hardware["nodes"] > 1:
            raise UserError(
                f"hardware.nodes={hardware['nodes']}: hydra/launcher={self.launcher} runs a job on one machine alone; "
                "choose hydra/launcher=submitit_slurm hardware=slurm"
            )

    def visible_gpus(self) -> list[str]:
        return visible_gpus()

    def devices(self, hardware: dict[str, Any]) -> tuple[int, bool]:
        """How many GPUs a job takes, and whether it runs on several devices."""
        self.one_node(hardware)
        wanted, given = hardware["devices"], self.options["gpus_per_job"]
        if hardware["accelerator"] == "cpu" or not self.gpus:
            if given and hardware["accelerator"] != "cpu":
                raise UserError(f"hydra.launcher.gpus_per_job={given}: no GPU is visible here")
            return 0, wanted != "auto" and wanted > 1
        if given == 0:
            return 0, (len(self.gpus) if wanted == "auto" else wanted) > 1
        gpus = given or (len(self.gpus) if wanted == "auto" else wanted)
        if gpus * (self.options["jobs"] or 1) > len(self.gpus):
            raise UserError(
                f"hydra.launcher: {self.options['jobs'] or 1} jobs at a time with {gpus} GPUs each, but "
                f"{len(self.gpus)} are visible here; lower jobs or gpus_per_job (0: they share all)"
            )
        return gpus, (gpus if wanted == "auto" else wanted) > 1

    # --- running them ---

    def work(self, jobs: list[Job]) -> None:
        waiting = [job for job in jobs if job.state == "waiting"]
        limit = self.limit(waiting)
        free, held = list(self.gpus), dict[int, list[str]]()
        running: dict[int, Job] = {}
        with sweep_view.View(self.folder, jobs, limit) as view:
            while waiting or running:
                server = self.serving()
                while waiting and len(running) < limit and waiting[0].gpus <= len(free):
                    job = waiting.pop(0)
                    held[job.number], free = free[: job.gpus], free[job.gpus :]
                    running[job.number] = job
                    self.start(server, job, limit, held[job.number])
                    view.started(job)
                try:
                    ended = server.wait(0.5)
                except EOFError:  # the server was killed, and its jobs with it; the next ones get another
                    ended, self.server = dict.fromkeys(running, -signal.SIGKILL), None
                for number, code in ended.items():
                    job = running.pop(number)
                    free += held.pop(number)
                    job.started = server.began.get(number, job.started)
                    finish(job, code)
                    view.ended(job)
                view.update()

    def limit(self, jobs: list[Job]) -> int:
        """How many run at a time."""
        share = max((job.gpus for job in jobs), default=0)
        return self.options["jobs"] or (len(self.gpus) // share if share else 1)

    def threads(self, limit: int) -> int | None:
        """CPU threads of a job."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.options["threads"] or (max(1, cores // limit) if limit > 1 else None)

    def serving(self) -> Any:
        if self.server is None:
            assert self.lock is not None
            self.server = Server(self.folder / "server.log", self.lock)
            weakref.finalize(self, self.server.close)
        return self.server

    def end_server(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
        log_file = self.folder / "server.log"
        if log_file.is_file() and not log_file.stat().st_size:
            log_file.unlink()

    def start(self, server: Any, job: Job, limit: int, gpus: list[str]) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.state, job.started = "running", time.monotonic()
        arguments = arguments_of(job, list(self.config.hydra.overrides.hydra), self.folder, self.threads(limit))
        server.start(job, arguments, {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
