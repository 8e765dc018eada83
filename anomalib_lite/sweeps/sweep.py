"""A sweep: its jobs in processes of their own, several at a time, and a folder that records which are finished.

A job is identified by its overrides, in any order. `sweep.json` in the sweep's folder stores which job lies in which
folder. What a run left in its folder says whether the job is finished, interrupted or failed."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, setup_globals
from omegaconf import OmegaConf, open_dict, read_write

from anomalib_lite.cli import schema as configuration
from anomalib_lite.comparison.find_runs import shorten
from anomalib_lite.data.cores import cores, threads
from anomalib_lite.errors import UserError
from anomalib_lite.paths import write_text
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.folder import is_run, make_absolute
from anomalib_lite.runs.inputs import check_inputs
from anomalib_lite.runs.objective import check_objective
from anomalib_lite.sweeps.forks import ForkedJobs
from anomalib_lite.sweeps.job import Job, as_typed, check_known, check_whole, key_of, match, without_value
from anomalib_lite.sweeps.view import View, print_end, print_interrupted

log = logging.getLogger(__name__)
#: the options of launchers that are whole numbers, with the lowest one
LOWEST = {
    "jobs": 1, "jobs_per_gpu": 1, "threads": 1, "gpus_per_job": 0, "cpus_per_job": 1, "timeout_min": 1,
    "gpus_per_node": 0, "cpus_per_task": 1, "mem_gb": 1, "signal_delay_s": 1, "max_num_timeout": 0,
}  # fmt: skip
PATIENCE = 10.0  # seconds that the previous sweep in the same folder may take to end


class Sweep:
    """A sweep on this machine. It lives as long as Hydra's sweeper, which may launch several batches of jobs."""

    launcher = "processes"

    def __init__(self, options: dict[str, Any], config: Any, loader: Any):
        check_known("launcher", self.launcher, options)
        for name in LOWEST.keys() & options.keys():
            check_whole(f"hydra.launcher.{name}", options[name], LOWEST[name], optional=True)
        self.options, self.config, self.loader = options, config, loader
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()
        self.index = self.folder / "sweep.json"
        self.sweeper = str(config.hydra.sweeper._target_).rpartition(".")[2]
        self.searches = self.sweeper == "SearchSweeper"  # a search prints the end after its last batch
        if self.sweeper == "BasicSweeper" and (size := config.hydra.sweeper.max_batch_size) is not None:
            raise UserError(
                f"hydra.sweeper.max_batch_size={size}: the sweep would end after a batch with a failed job; leave it "
                f"out, and give hydra.launcher.jobs={size} to run {size} jobs at a time"
            )
        self.gpus, self.jobs_per_gpu = self.visible_gpus(), self.options.get("jobs_per_gpu") or 1
        self.jobs: dict[str, Job] = {}
        self.engine: Any = None  # starts jobs and reports their ends, as ForkedJobs does

    def launch(self, job_overrides: list[list[str]], first: int) -> list[JobReturn]:
        """Run a batch of jobs, the first with number `first`. Exits with 1 after the last one if a job failed; a search
        does so after its last batch.
        """
        setup_globals()
        if not job_overrides:
            raise without_value(as_typed(self.config.hydra.overrides.task), self.loader)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        self.folder.mkdir(parents=True, exist_ok=True)
        with claimed(self.folder, "hydra.sweep.dir", ".sweeping", PATIENCE):
            keys = [key_of(overrides) for overrides in job_overrides]
            self.plan(dict(zip(keys, job_overrides, strict=True)), first)
            jobs = list({key: self.jobs[key] for key in keys}.values())
            try:
                self.run(jobs)
            except BaseException:
                if self.engine is not None:
                    self.engine.close()
                for job in jobs:
                    job.state = "interrupted" if job.state == "running" else job.state
                print_interrupted(self.folder, jobs)
                raise
        if not self.searches:
            self.print_end()
            self.exit_if_failed()
        return [self.jobs[key].returned() for key in keys]

    def print_end(self) -> None:
        """Print the comparison of all jobs, also of earlier batches."""
        print_end(self.folder, list(self.jobs.values()))

    def exit_if_failed(self) -> None:
        if any(job.state == "failed" for job in self.jobs.values()):
            sys.exit(1)

    # --- which jobs there are, and where they lie ---

    def plan(self, batch: dict[str, list[str]], first: int) -> None:
        """Compose and check all jobs of the batch, and store their folders, before any of them starts."""
        try:
            entries = json.loads(self.index.read_text())["jobs"] if self.index.is_file() else []
            known = {key_of(entry["overrides"]): entry for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.index}: damaged; choose another hydra.sweep.dir") from error
        known = match(known, batch, self.jobs)
        if not self.jobs and known and not (known.keys() <= batch.keys() or batch.keys() <= known.keys()):
            theirs = next(entry["overrides"] for key, entry in known.items() if key not in batch)
            ours = min(batch.values(), key=lambda each: len({*each} ^ {*theirs}))
            has, given = (
                " ".join(x for x in a if x not in b) or "nothing" for a, b in ((theirs, ours), (ours, theirs))
            )
            raise UserError(
                f"{self.folder} holds another sweep: a job of it has {has} where this command has {given}; repeat its "
                "command to continue it, or choose another hydra.sweep.dir"
            )
        for number, (key, overrides) in enumerate(batch.items(), first):
            if key not in self.jobs:
                job = self.jobs[key] = self.compose(overrides, number, known.get(key), list(known.values()))
                folder = str(job.folder.relative_to(self.folder))
                known[key] = {"number": job.number, "folder": folder, "overrides": overrides}
        write_text(self.index, json.dumps({"jobs": list(known.values())}, indent=1) + "\n")
        if older := [job for job in self.jobs.values() if job.changed]:
            log.warning(
                "the module %s has changed since these jobs ended, whose results remain: %s; remove their folders in "
                "%s to run them again",
                ", ".join(sorted({name for job in older for name in job.changed})),
                shorten(str(job.number) for job in older),
                self.folder,
            )

    def compose(self, overrides: list[str], number: int, entry: Any, others: list[dict[str, Any]]) -> Job:
        """A job with its folder and state: as stored in its entry, else the first free number and folder."""
        taken = {other["number"]: other["folder"] for other in others}
        if entry:
            number = entry["number"]
        elif number in taken:
            number = max(taken) + 1
        cfg = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)  # for interpolations that refer to it
        try:
            subfolder = entry["folder"] if entry else str(cfg.hydra.sweep.subdir)
            with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
                cfg.hydra.runtime.output_dir = str(self.folder / subfolder)
            task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
            plain: Any = OmegaConf.to_container(task, resolve=True)
        finally:
            HydraConfig.instance().cfg = before
        if not entry and subfolder in taken.values():
            raise UserError(f"hydra.sweep.subdir: two jobs share the folder {subfolder}; name all that differs in it")
        configuration.check_composed(plain)
        make_absolute(plain)  # as the stored configuration of the job
        if plain["data"]["check"] == "only":
            raise UserError("data.check=only: makes no run; leave out -m, or add hydra.mode=RUN to an experiment")
        check_objective(plain)
        self.check_held_out(plain)
        job = Job(number, overrides, self.folder / subfolder, cfg, plain, *self.devices(plain["hardware"]))
        job.find_earlier_run()
        if self.launcher == "processes" and not is_run(job.folder):  # elsewhere this machine may not see the data
            check_inputs(plain)
        return job

    def check_held_out(self, plain: dict[str, Any]) -> None:
        """UserError if a sweeper that optimises would get no objective."""
        is_random = self.searches and self.config.hydra.sweeper._args_ == ["random"]
        if self.sweeper == "BasicSweeper" or (is_random and plain["objective"] is None):
            return
        if plain["objective"] is None or plain["data"]["val_fraction"] == 0:
            raise UserError(
                f"hydra/sweeper: objective={plain['objective'] or 'null'} is measured on held-out training images, and "
                f"data.val_fraction={plain['data']['val_fraction']}; give objective=validation.image_auroc "
                "data.val_fraction=0.2"
            )

    # --- what they run on ---

    def visible_gpus(self) -> list[str]:
        """The GPUs' names that CUDA_VISIBLE_DEVICES takes, found without torch; a divided GPU's parts (MIG) by UUID."""
        if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            return [name for name in given.split(",") if name.strip() not in ("", "-1")]
        if shutil.which("nvidia-smi") is None:
            if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
                log.warning("nvidia-smi is missing, which lists the GPUs; name them, as in CUDA_VISIBLE_DEVICES=0,1")
            return []
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        names = list[str]()
        for gpu in re.split(r"^(?=GPU \d+:)", listed, flags=re.MULTILINE):
            if number := re.match(r"GPU (\d+):", gpu):
                names += re.findall(r"\(UUID: (MIG-[^)]+)\)", gpu) or [number[1]]
        return names

    def check_one_node(self, hardware: dict[str, Any]) -> None:
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

    def devices(self, hardware: dict[str, Any]) -> tuple[int, bool]:
        """How many GPUs a job reserves, and whether it runs on several devices."""
        self.check_one_node(hardware)
        wanted, given = hardware["devices"], self.options["gpus_per_job"]
        if given == 0:
            raise UserError(
                "hydra.launcher.gpus_per_job=0: all jobs would use GPU 0; give jobs_per_gpu=2 for two on each"
            )
        if hardware["accelerator"] == "cpu" or not self.gpus:
            if given and hardware["accelerator"] != "cpu":
                raise UserError(f"hydra.launcher.gpus_per_job={given}: no GPU is visible here")
            return 0, wanted != "auto" and wanted > 1
        gpus, jobs = given or (len(self.gpus) if wanted == "auto" else wanted), self.options["jobs"] or 1
        if gpus > len(self.gpus) or gpus * jobs > len(self.gpus) * self.jobs_per_gpu:
            raise UserError(
                f"hydra.launcher: {jobs} jobs at a time with {gpus} GPUs each, but {len(self.gpus)} are visible here; "
                "lower jobs or gpus_per_job, or let jobs share a GPU with jobs_per_gpu"
            )
        return gpus, (gpus if wanted == "auto" else wanted) > 1

    def limit(self, jobs: list[Job]) -> int:
        """How many jobs run at a time."""
        share = max((job.gpus for job in jobs), default=0)
        return self.options["jobs"] or (len(self.gpus) * self.jobs_per_gpu // share if share else 1)

    def threads(self, limit: int) -> int | None:
        """CPU threads of each job."""
        return self.options["threads"] or (min(threads(), max(1, cores() // limit)) if limit > 1 else None)

    # --- running them ---

    def make_engine(self) -> Any:
        return ForkedJobs()

    def run(self, jobs: list[Job]) -> None:
        """Run the waiting jobs and set the state of each when it ends."""
        waiting = [job for job in jobs if job.state == "waiting"]
        limit, free, held = self.limit(waiting), self.gpus * self.jobs_per_gpu, dict[int, list[str]]()
        running: dict[int, Job] = {}
        hydra = as_typed(self.config.hydra.overrides.hydra)
        if waiting and self.engine is None:
            self.engine = self.make_engine()
            weakref.finalize(self, self.engine.close)
        with View(self.folder, jobs, limit) as view:
            while waiting or running:
                while waiting and len(running) < limit and waiting[0].gpus <= len(set(free)):
                    job = waiting.pop(0)
                    gpus = sorted(dict.fromkeys(free), key=lambda gpu: -free.count(gpu))[: job.gpus]  # least busy first
                    for gpu in gpus:
                        free.remove(gpu)
                    running[job.number], held[job.number] = job, gpus
                    job.start()
                    environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
                    self.engine.start(job, job.command(hydra, self.folder, self.threads(limit), environment))
                    view.started(job)
                for number, code in self.engine.wait(0.5).items():
                    job = running.pop(number)
                    free += held.pop(number)
                    job.started = self.engine.started.get(number, job.started)
                    job.finish(code)
                    view.ended(job)
                view.update()
