"""A job of a sweep: how it is identified, what an earlier launch left of it, and how its end is judged."""

import json
import logging
import re
import shutil
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import OmegaConf

from anomalib_lite.cli.schema import is_free, types_of
from anomalib_lite.comparison.find_runs import EVALUATED
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from anomalib_lite.runs import folder, own_modules
from anomalib_lite.runs.artifacts import read_result
from anomalib_lite.runs.objective import objective
from anomalib_lite.sweeps.command import Command, config_flags, quoted

log = logging.getLogger(__name__)
#: keys, and the group with some of them, that may change on resume and still decide the result of a finished job
DECISIVE = ("objective", *EVALUATED, "hardware", "hardware.deterministic", "cache.dtype")
#: Hydra's options that belong to the sweep and not to its jobs
SWEEP_OPTIONS = re.compile(r"[~+]*hydra[./](mode|run\.dir|sweep|sweeper|launcher|job\.(num|id))\b")


@dataclass
class Job:
    """One run of the sweep. `state`: waiting, running, done, done before, failed, interrupted."""

    number: int
    overrides: list[str]
    folder: Path
    cfg: Any  # composed, with Hydra's part
    plain: dict[str, Any]  # without it
    gpus: int
    several: bool  # whether it runs on several devices
    state: str = "waiting"
    resume: bool = False
    started: float = 0.0
    written: int = 0  # bytes in output.log from earlier attempts
    seconds: float | None = None
    failure: str = ""
    changed: list[str] = field(default_factory=list)  # the user's own modules that have changed since a run was done
    result: dict[str, Any] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "output.log"

    @property
    def objective(self) -> float | None:
        return objective(self.plain["objective"], self.result) if self.result else None

    def command(self, hydra: list[str], sweep: Path, threads: int | None, environment: dict[str, str]) -> Command:
        """The command that runs the job alone. `hydra`: the overrides of Hydra's own options given to the sweep."""
        arguments = [
            *config_flags(),
            *(override for override in hydra if not SWEEP_OPTIONS.match(override)),
            *self.overrides,
            *[f"hardware.threads={threads}"] * (threads is not None and self.plain["hardware"]["threads"] is None),
            "hydra.mode=RUN",
            f"hydra.job.num={self.number}",
            f"hydra.job.id={self.number}",
            f"hydra.sweep.dir={quoted(sweep)}",
            f"hydra.run.dir={quoted(self.folder)}",
        ]
        return Command(arguments, self.folder, environment)

    def find_earlier_run(self) -> None:
        """Set the state from what an earlier launch left: the job is done, resumes, or starts again if damaged."""
        if not folder.is_run(self.folder):
            return
        try:
            earlier, _ = folder.read_config(self.folder)
        except UserError as error:
            log.warning("%s; job %d starts again", error, self.number)
            put_aside(self.folder / folder.CHECKPOINTS)
            put_aside(self.folder / folder.RESULT)
            return
        folder.check_unchanged(earlier, self.plain, self.folder)
        self.resume = True
        if folder.is_finished(self.folder):
            try:
                result = read_result(self.folder)
                for key in ("metrics", "validation", "method", "dataset", "categories"):  # what a sweep shows
                    result[key]
                self.result, self.state = result, "done before"
                self.changed = own_modules.changed(self.plain, folder.stored_digests(self.folder))
            except (UserError, KeyError) as error:
                reason = error if isinstance(error, UserError) else f"{self.folder / folder.RESULT}: no {error} in it"
                log.warning("%s; job %d is evaluated again", reason, self.number)
                put_aside(self.folder / folder.RESULT)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state, self.started = "running", time.monotonic()
        self.written = self.output.stat().st_size if self.output.exists() else 0

    def finish(self, code: int) -> None:
        """Set the state from the exit code and from what the run left."""
        self.seconds = time.monotonic() - self.started
        try:
            if code == 0:
                self.result, self.state = read_result(self.folder), "done"
                return
            self.failure = reason(self.output, self.written) or f"exit code {code}"
            if code < 0:
                self.failure = f"killed by {signal.Signals(-code).name}"
        except UserError as error:
            self.failure = str(error)
        self.state = "failed"

    def returned(self) -> JobReturn:
        """What Hydra's sweepers expect of a finished job."""
        task = OmegaConf.masked_copy(self.cfg, [key for key in self.cfg if key != "hydra"])
        hydra = OmegaConf.masked_copy(self.cfg, "hydra")
        made = JobReturn(self.overrides, task, hydra, str(self.folder), "train")
        made.return_value, made.status = self.objective, JobStatus.COMPLETED
        return made


def key_of(overrides: list[str]) -> str:
    """What identifies a job: its overrides in any order, without quotes and without those that change no result."""
    plain = [re.sub("[\"']", "", override) for override in filter_overrides(overrides)]
    named = [each for each in plain if each.lstrip("+").partition("=")[0] not in ("resume", "debug")]
    return json.dumps(sorted(named))


def match(known: dict[str, Any], batch: dict[str, list[str]], ours: Collection[str]) -> dict[str, Any]:
    """A folder's entries by the keys of the jobs that continue them, or by their own keys.

    If no job of the batch has an entry's overrides, a job continues an entry that differs only in what may change on
    resume. `ours` are the keys of the jobs that this command has already planned.
    """
    waiting = [key for key in known if key not in ours]
    old = {bound_key(known[key]["overrides"]): key for key in waiting}
    new = {bound_key(overrides): key for key, overrides in batch.items()}
    if known.keys() & batch.keys() or len(old) < len(waiting) or len(new) < len(batch):  # such keys may be swept too
        return known
    continued = {key: new.get(bound, key) for bound, key in old.items()}
    return {continued.get(key, key): entry for key, entry in known.items()}


def bound_key(overrides: list[str]) -> str:
    """As key_of, without the overrides that may change on resume and concern neither the data nor the results."""

    def is_bound(key: str) -> bool:
        return key in DECISIVE or (key.startswith("data.") and str in types_of(key)) or not is_free(key, "resume")

    return key_of([each for each in overrides if is_bound(each.lstrip("+~").partition("=")[0])])


def as_typed(overrides: Any) -> list[str]:
    """Hydra's list of overrides; iterating over it would resolve the interpolations in them."""
    typed: Any = OmegaConf.to_container(overrides)
    return typed


def without_value(overrides: list[str], loader: Any) -> UserError:
    """The error for a sweep without any job; it names the overrides that give no value."""
    parsed = OverridesParser.create(loader).parse_overrides(overrides)
    empty = [each.input_line for each in parsed if each.is_sweep_override() and not [*each.sweep_iterator()]]
    return UserError(f"{', '.join(map(str, empty))}: no value, so the sweep has no job; give at least one value")


def put_aside(place: Path) -> None:
    if place.exists():
        aside = place.with_name(f"{place.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.replace(aside)


def last_lines(file: Path, size: int, start: int = 0) -> list[str]:
    """The lines in the last `size` bytes of a text file, from byte `start`, that are not blank."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(start, file.stat().st_size - size))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()]


def last_line(file: Path) -> str:
    """The last line of a text file that is not blank; "" if there is none."""
    return "".join(last_lines(file, 2000)[-1:]).strip()


def reason(file: Path, start: int) -> str:
    """The first line of the last error in a job's output from byte `start`; else its last line, or ""."""
    lines = last_lines(file, 2**16, start)
    for number, line in reversed([*enumerate(lines)]):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if line.startswith('  File "'):  # of a traceback, whose message follows without indentation
            return next((after for after in lines[number:] if not after[0].isspace()), lines[-1].strip())
    return lines[-1].strip() if lines else ""


def check_known(group: str, choice: str, options: dict[str, Any]) -> None:
    """UserError for an option that this choice of hydra/launcher or hydra/sweeper lacks: +KEY=VALUE adds any name."""
    known = OmegaConf.load(HOME / "conf" / "hydra" / group / f"{choice}.yaml")
    if unknown := options.keys() - known.keys():
        raise UserError(f"hydra.{group}.{min(unknown)}: no such option of {choice}; see --cfg hydra")


def check_whole(key: str, value: Any, low: int, optional: bool = False) -> None:
    """UserError unless the option is a whole number from `low`, or null if it is optional."""
    if (value is not None or not optional) and (not isinstance(value, int) or isinstance(value, bool) or value < low):
        raise UserError(f"{key}={value}: give a whole number from {low}{', or null' * optional}")
