"""How far something is that takes long: a bar in a terminal, else a line of the log now and then."""

import logging
import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class ProgressBar:
    """A progress bar in a terminal; elsewhere a line of the log every ten seconds."""

    def __init__(self, what: str, total: int | None, done: int = 0, quiet: bool = False):
        self.quiet = quiet
        self.what, self.total, self.done, self.last = what, total, done, time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console

            text = TextColumn("{task.description}")
            columns = (
                text,
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=done, note="")

    def step(self, note: str = "", count: int = 1) -> None:
        self.done += count
        if self.quiet or (time.monotonic() - self.last < (0.2 if self.bar else 10) and self.done != self.total):
            return
        self.last = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=note)
        else:
            log.info("%s %d/%s %s", self.what, self.done, self.total or "?", note)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
