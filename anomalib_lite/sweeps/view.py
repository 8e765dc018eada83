"""What a sweep shows in the terminal: how far it is while it works, and one table at its end."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anomalib_lite.sweeps.job import Job, last_line

log = logging.getLogger(__name__)
SHOWN = ("image_auroc", "pixel_auroc", "aupro_30")


class View:
    """In a terminal a picture that renews itself; elsewhere a line of the log for each job begun and ended."""

    def __init__(self, folder: Path, jobs: list[Job], limit: int):
        self.folder, self.jobs, self.limit = folder, jobs, limit
        self.names = differences(jobs)
        self.live = Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else None

    def __enter__(self) -> "View":
        before = sum(job.state == "done before" for job in self.jobs)
        log.info("sweep of %d jobs in %s%s", len(self.jobs), self.folder, f", {before} done before" * bool(before))
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def started(self, job: Job) -> None:
        if not self.live:
            log.info("job %d %s: %s", job.number, "resumed" if job.resume else "started", self.named(job))

    def ended(self, job: Job) -> None:
        if not self.live:
            log.info("job %d %s after %.1f s; %s", job.number, job.state, job.seconds, self.summary())

    def update(self) -> None:
        if self.live:
            lines = [Text(f"{self.folder.name}: {self.summary()}", style="bold")]
            for job in (job for job in self.jobs if job.state == "running"):
                line = f"  {job.number}  {self.named(job)}  {duration(time.monotonic() - job.started)}  "
                lines.append(Text(line + last_line(job.output), overflow="ellipsis", no_wrap=True))
            self.live.update(Group(*lines), refresh=True)

    def named(self, job: Job) -> str:
        return " ".join(f"{key}={value}" for key, value in zip(self.names, values(job, self.names), strict=True))

    def summary(self) -> str:
        """Jobs done, running, failed; time left; the best so far."""
        count = {state: sum(job.state == state for job in self.jobs) for state in ("running", "failed", "waiting")}
        parts = [f"{sum(job.state.startswith('done') for job in self.jobs)} of {len(self.jobs)} done"]
        parts += [f"{count[state]} {state}" for state in ("running", "failed") if count[state]]
        took = [job.seconds for job in self.jobs if job.state == "done" and job.seconds]
        if took and count["running"] + count["waiting"]:
            mean = sum(took) / len(took)
            begun = [time.monotonic() - job.started for job in self.jobs if job.state == "running"]
            left = mean * count["waiting"] + sum(max(0.0, mean - seconds) for seconds in begun)
            parts.append(f"about {duration(left / self.limit)} left")
        best = max(
            ((job.objective, job) for job in self.jobs if job.objective is not None), key=lambda x: x[0], default=None
        )
        if best:
            parts.append(f"best {best[1].plain['objective']} {best[0]:.4f} (job {best[1].number})")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def settings(job: Job) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in job.overrides)}


def differences(jobs: list[Job]) -> list[str]:
    """What the jobs differ in."""
    keys = dict.fromkeys(key for job in jobs for key in settings(job))
    return [key for key in keys if len({settings(job).get(key) for job in jobs}) > 1]


def values(job: Job, names: list[str]) -> list[str]:
    return [settings(job).get(name, "") for name in names]


def show(folder: Path, jobs: list[Job]) -> None:
    """The table, and below it what went wrong where."""
    names = differences(jobs)
    fixed = [name for name in ("method", "data.category") if name not in names]
    console = Console(width=None if Console().is_terminal else 120)
    table = Table("job", title=f"{folder}, in percent", title_justify="left", box=box.SIMPLE_HEAD)
    short = [name.rpartition(".")[2] for name in (*fixed, *names)]
    for full, name in zip((*fixed, *names), short, strict=True):
        table.add_column(name if short.count(name) == 1 else full, overflow="fold")
    objectives = {job.plain["objective"] for job in jobs if job.objective is not None}
    chosen_by = objectives.pop() if len(objectives) == 1 else None  # beside the test's numbers, which choose nothing
    for heading in (*SHOWN, *filter(None, [chosen_by and chosen_by.replace(".", " ")]), "state", "seconds"):
        table.add_column(
            heading.replace("_", " "), justify="left" if heading == "state" else "right", no_wrap=heading == "state"
        )
    for job in jobs:
        metrics = (job.result or {}).get("metrics", {})
        common = {"method": (job.result or {}).get("method", ""), "data.category": ""}
        if job.result:
            common["data.category"] = f"{job.result['dataset']} {','.join(job.result['categories'])}"
        numbers = ["–" if metrics.get(key) is None else f"{100 * metrics[key]:.1f}" for key in SHOWN]
        if chosen_by:
            numbers.append("–" if job.objective is None else f"{100 * job.objective:.1f}")
        seconds = "" if job.seconds is None else f"{job.seconds:.1f}"
        row = [str(job.folder.relative_to(folder)), *(common[name] for name in fixed), *values(job, names)]
        table.add_row(*map(Text, [*row, *numbers, job.state, seconds]))
    console.print(table)
    for job in jobs:
        if job.state == "failed":
            about = " ".join(f"{name}={value}" for name, value in zip(names, values(job, names), strict=True))
            print(f"error: job {job.number} ({about}): {job.why}; see {job.output}", file=sys.stderr)
    failed = sum(job.state == "failed" for job in jobs)
    if failed:
        say = "the same command retries them" if len(jobs) > 1 else "the same command retries it"
        print(f"error: {failed} of {len(jobs)} jobs failed; {say}, with hydra.sweep.dir={folder}", file=sys.stderr)


def say_interrupted(folder: Path, jobs: list[Job]) -> None:
    done = sum(job.state.startswith("done") for job in jobs)
    print(f"{done} of {len(jobs)} jobs are done; to go on: the same command, hydra.sweep.dir={folder}", file=sys.stderr)
