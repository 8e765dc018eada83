"""Progress of work that takes long: a bar in a terminal, elsewhere a line of the log at most every ten seconds."""

import logging
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anomalib_lite.console import is_interactive, make_console

log = logging.getLogger(__name__)


class ProgressBar:
    """A context manager, or ended by `close`.

    Args:
        what: the name of the work. total: number of its steps. done: steps that are done already.
        quiet: show nothing, as on other ranks than the first.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, quiet: bool = False):
        self.what, self.total, self.done, self.quiet = what, total, done, quiet
        self.last, self.bar = time.monotonic(), None
        if not quiet and is_interactive(stderr=True):
            name, note = (TextColumn(f"{{task.{text}}}", markup=False) for text in ("description", "fields[note]"))
            columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self.bar = Progress(*columns, console=make_console(stderr=True, is_live=True), transient=True)
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

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
