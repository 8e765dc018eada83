"""A job of a sweep: what it is known by, the command line that runs it alone, and what became of it."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import OmegaConf

from anomalib_lite.cli.keys import translate
from anomalib_lite.errors import UserError
from anomalib_lite.runs import folder
from anomalib_lite.runs.artifacts import read_result

log = logging.getLogger(__name__)
#: of Hydra's own options, those that are the sweep's and not its jobs'
SWEEPS_OWN = re.compile(r"[~+]*hydra[./](mode|run\.dir|sweep|sweeper|launcher|job\.(num|id))\b")


@dataclass
class Job:
    """One run of the sweep. `state`: waiting, running, done, done before, failed, interrupted."""

    number: int
    overrides: list[str]
    folder: Path
    cfg: Any  # composed, with hydra's part
    plain: dict[str, Any]
    gpus: int
    several: bool  # devices
    state: str = "waiting"
    resume: bool = False
    started: float = 0.0
    seconds: float | None = None
    why: str = ""
    result: dict[str, Any] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "output.log"

    @property
    def objective(self) -> float | None:
        return folder.objective(self.plain["objective"], self.result) if self.result else None


def key_of(overrides: list[str]) -> str:
    """What a job is known by."""
    named = [o for o in filter_overrides(overrides) if o.lstrip("+").partition("=")[0] not in ("resume", "debug")]
    return json.dumps(sorted(named))


def entry_of(job: Job, folder: Path) -> dict[str, Any]:
    return {"number": job.number, "folder": str(job.folder.relative_to(folder)), "overrides": job.overrides}


def arguments_of(job: Job, hydra: list[str], sweep: Path, threads: int | None) -> list[str]:
    """The command line that runs the job alone. `hydra`: the sweep's overrides of Hydra's own options."""
    return [
        *flags(),
        *(override for override in hydra if not SWEEPS_OWN.match(override)),
        *job.overrides,
        *[f"hardware.threads={threads}"] * (threads is not None and job.plain["hardware"]["threads"] is None),
        *["resume=true"] * job.resume,
        "hydra.mode=RUN",
        f"hydra.job.num={job.number}",
        f"hydra.job.id={job.number}",
        f"hydra.sweep.dir={quoted(sweep)}",
        f"hydra.run.dir={quoted(job.folder)}",
    ]


def flags() -> list[str]:
    """The command's flags that say where configurations lie."""
    known = get_args_parser().parse_known_args()[0]
    names = ("config_path", "config_name", "config_dir")
    return [
        part for name in names if (value := getattr(known, name)) for part in (f"--{name.replace('_', '-')}", value)
    ]


def quoted(path: Path) -> str:
    return '"' + str(path).replace('"', '\\"') + '"'


def before_now(job: Job) -> None:
    """What an earlier launch has left of the job: it is done, goes on, or begins anew where the files are damaged."""
    stored = job.folder / "checkpoints" / "config.json"
    if not stored.is_file():
        return
    try:
        begun = translate(json.loads(stored.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged (%s); job %d begins anew", stored, error, job.number)
        for place in (stored.parent, job.folder / "result.json"):
            put_aside(place)
        return
    folder.check_unchanged(begun, job.plain, job.folder)
    job.resume = True
    if (job.folder / "result.json").is_file():
        try:
            result = read_result(job.folder)
            for key in ("metrics", "validation", "method", "dataset", "categories"):  # what a sweep shows
                result[key]
            job.result, job.state = result, "done before"
        except (UserError, KeyError) as error:
            why = error if isinstance(error, UserError) else f"{job.folder / 'result.json'}: no {error} in it"
            log.warning("%s; job %d is evaluated again", why, job.number)
            put_aside(job.folder / "result.json")


def put_aside(place: Path) -> None:
    if place.exists():
        aside = place.with_name(f"{place.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.replace(aside)


def finish(job: Job, code: int) -> None:
    """The job's state from its exit code and what it left."""
    job.seconds = time.monotonic() - job.started
    if code == 0:
        try:
            job.result, job.state = read_result(job.folder), "done"
        except UserError as error:
            job.state, job.why = "failed", str(error)
        return
    last = last_line(job.output).removeprefix("error: ")
    job.state = "failed"
    job.why = f"killed by {signal.Signals(-code).name}" if code < 0 else last or f"exit code {code}"


def returned(job: Job) -> JobReturn:
    """For the sweeper."""
    task = OmegaConf.masked_copy(job.cfg, [key for key in job.cfg if key != "hydra"])
    made = JobReturn(job.overrides, task, OmegaConf.masked_copy(job.cfg, "hydra"), str(job.folder), "train")
    made.return_value, made.status = job.objective, JobStatus.COMPLETED
    return made


def visible_gpus() -> list[str]:
    """The ids that CUDA_VISIBLE_DEVICES takes, found without torch."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(re.findall(r"^GPU ", listed, re.MULTILINE))]


def last_line(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 2000))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
