"""What a sweep shows in the terminal: its progress while it runs, and the comparison at its end."""

import json
import logging
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from anomalib_lite.comparison import find_runs, grouping, terminal
from anomalib_lite.comparison.tables import Row
from anomalib_lite.console import is_interactive, make_console
from anomalib_lite.runs.folder import WANDB
from anomalib_lite.sweeps.job import Job, key_of, last_line

log = logging.getLogger(__name__)
SHOWN = ("image_auroc", "pixel_auroc", "aupro_30")


class View:
    """The progress: a display that is updated in a terminal, else a log line for each start and end of a job."""

    def __init__(self, folder: Path, jobs: list[Job], limit: int):
        self.folder, self.jobs, self.limit, self.names = folder, jobs, limit, differences(jobs)
        self.live = None
        if is_interactive():
            self.live = Live(console=make_console(is_live=True), auto_refresh=False, transient=True)

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
            log.info("job %d %s: %s", job.number, "resumed" if job.resume else "started", settings(job, self.names))

    def ended(self, job: Job) -> None:
        if not self.live:
            log.info("job %d %s after %.1f s; %s", job.number, job.state, job.seconds, self.summary())

    def update(self) -> None:
        if self.live:
            lines = [Text(f"{self.folder.name}: {self.summary()}", style="bold")]
            for job in (job for job in self.jobs if job.state == "running"):
                line = f"  {job.number}  {settings(job, self.names)}  {duration(time.monotonic() - job.started)}  "
                lines.append(Text(line + last_line(job.output), overflow="ellipsis", no_wrap=True))
            self.live.update(Group(*lines), refresh=True)

    def summary(self) -> str:
        """How many jobs are done, running and failed; the time left; the best job so far."""
        count = {state: sum(job.state == state for job in self.jobs) for state in ("running", "failed", "waiting")}
        parts = [f"{sum(job.state.startswith('done') for job in self.jobs)} of {len(self.jobs)} done"]
        parts += [f"{count[state]} {state}" for state in ("running", "failed") if count[state]]
        durations = [job.seconds for job in self.jobs if job.state == "done" and job.seconds]
        if durations and count["running"] + count["waiting"]:
            mean = sum(durations) / len(durations)
            elapsed = [time.monotonic() - job.started for job in self.jobs if job.state == "running"]
            left = mean * count["waiting"] + sum(max(0.0, mean - seconds) for seconds in elapsed)
            parts.append(f"about {duration(left / self.limit)} left")
        measured = [(job.objective, job) for job in self.jobs if job.objective is not None]
        if measured:
            value, best = max(measured, key=lambda pair: pair[0])
            parts.append(f"best {best.plain['objective']} {value:.4f} (job {best.number})")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def values(job: Job) -> dict[str, str]:
    """{key: value} of a job's overrides, without quotes."""
    parts = (override.partition("=") for override in job.overrides)
    return {key.lstrip("+"): re.sub("[\"']", "", value) for key, _, value in parts}


def differences(jobs: list[Job]) -> list[str]:
    """The keys in which the jobs differ."""
    keys = dict.fromkeys(key for job in jobs for key in values(job))
    return [key for key in keys if len({values(job).get(key) for job in jobs}) > 1]


def settings(job: Job, keys: list[str]) -> str:
    return " ".join(f"{key}={values(job).get(key, '')}" for key in keys)


def print_end(folder: Path, jobs: list[Job]) -> None:
    """Print the comparison of all finished jobs, and on stderr a line for each failed one."""
    job_of = {job.folder: job for job in jobs if job.result}
    problems: list[str] = []
    runs, left_out = find_runs.read(job_of, problems)
    runs = [run for run in runs if run.folder in job_of]  # without evaluations that are stored in a job's folder
    tables = grouping.tables(runs)
    for number, table in enumerate(tables, 1):
        metrics = [metric for metric in SHOWN if any(table.means(row, metric) for row in table.rows)] or SHOWN[:1]
        title = f"table {number}: " * (len(tables) > 1)
        terminal.show(make_console(width=120), table, metrics, title, columns_of_jobs(job_of))
    states = Counter(job.state for job in jobs)
    print(f"{len(jobs)} jobs in {folder}: {', '.join(f'{count} {state}' for state, count in states.items())}")
    if runs:
        command = f"python -m anomalib_lite.compare {shlex.quote(str(folder))} --html page.html"
        print(f"more metrics, curves and heat maps: {command}")
    for line in closing_lines(folder, jobs):
        print(line)
    terminal.warn("left out", left_out)
    terminal.warn("warning", problems)
    failed, names = [job for job in jobs if job.state == "failed"], differences(jobs)
    for job in failed:
        print(f"error: job {job.number} ({settings(job, names)}): {job.failure}; see {job.output}", file=sys.stderr)
    if failed:
        retry = f"the same command retries {'them' if len(jobs) > 1 else 'it'}, with hydra.sweep.dir={folder}"
        print(f"error: {len(failed)} of {len(jobs)} jobs failed; {retry}", file=sys.stderr)


def closing_lines(folder: Path, jobs: list[Job]) -> list[str]:
    """What is printed below the table: notes on the jobs, and the command that uploads their W&B runs."""
    lines = [f"note: {note}" for note in seed_notes(jobs)]
    offline = sorted(str(run) for job in jobs for run in (job.folder / WANDB).glob("offline-run-*"))
    if offline:
        place = f"{shlex.quote(str(folder))}/*/{WANDB}/offline-run-*"  # one word for the shell to expand
        is_flat = all(job.folder.parent == folder for job in jobs)
        lines.append(f"W&B: to upload these runs: wandb sync {place if is_flat else shlex.join(offline)}")
    return lines


def seed_notes(jobs: list[Job]) -> list[str]:
    """A note for each method whose jobs with several seeds have equal results, to the last digit."""
    alike: dict[tuple[str, str], dict[int, str]] = {}
    for job in jobs:
        if job.result:
            others = key_of([override for override in job.overrides if not override.startswith("seed=")])
            measured = json.dumps([job.result.get(key) for key in ("per_category", "thresholds", "validation")])
            alike.setdefault((job.result["method"], others), {})[job.plain["seed"]] = measured
    several = {key: found for key, found in alike.items() if len(found) > 1}
    return [
        f"the results of {method} do not depend on the seed ({', '.join(map(str, seeds))}): one seed is enough"
        for method, seeds in {method: sorted(found) for (method, _), found in several.items()}.items()
        if all(len(set(found.values())) == 1 for (name, _), found in several.items() if name == method)
    ]


def columns_of_jobs(job_of: dict[Path, Job]) -> Mapping[str, Callable[[Row], str]]:
    """Columns of the final table: the numbers of a row's jobs, and the mean of their objective where there is one."""

    def numbers(row: Row) -> str:
        return find_runs.shorten(map(str, sorted(job_of[run.folder].number for run in row.all_runs())))

    def objective(row: Row) -> str:
        values = [job_of[run.folder].objective for run in row.all_runs()]
        measured = [value for value in values if value is not None]
        return f"{100 * sum(measured) / len(measured):.1f}" if measured else "–"

    names = {str(job.plain["objective"]) for job in job_of.values() if job.objective is not None}
    heading = "".join(names).replace(".", "\n")
    return {"jobs": numbers} | ({heading: objective} if len(names) == 1 else {})


def print_interrupted(folder: Path, jobs: list[Job]) -> None:
    done = sum(job.state.startswith("done") for job in jobs)
    cure = f"to continue: the same command, hydra.sweep.dir={folder}"
    print(f"{done} of {len(jobs)} jobs are done; {cure}", file=sys.stderr)
