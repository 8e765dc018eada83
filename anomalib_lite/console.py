"""Where the programs print. Nothing that is printed ends a program or changes its exit code."""

import codecs
import io
import logging
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
#: what stands for characters that the encoding of a terminal lacks; others become \\xe9 or \\u0416
PLAIN = {"–": "-", "…": "...", "±": "+-", "×": "x", "²": "^2", "█": "#", "░": "."} | dict.fromkeys("▏▎▍▌▋▊▉", ":")
NARROWEST = 80  # in a narrower terminal, lines wrap: a table that is squeezed loses digits


class _Output(io.FileIO):
    """A file descriptor whose reader may have ended, or whose disk may be full: what can't be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # another program made it non-blocking, and it is full
                select.select([], [self], [])
            return count
        except OSError:
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Make stdout and stderr accept every text, whatever their encoding and whoever reads them. Call it first."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # 0, 1 or 2 was closed: otherwise the next file that is opened becomes the program's output
    os.close(descriptor)
    codecs.register_error("plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor was closed
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):  # nobody has replaced it
            output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            lines = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "plain", line_buffering=lines))


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start]
    return PLAIN.get(text) or text.encode("ascii", "backslashreplace").decode(), error.start + 1


def make_console(width: int = 100, stderr: bool = False, is_live: bool = False) -> Any:
    """A `rich.console.Console` that shows text as it is: no name is taken for markup.

    Args:
        width: in characters where the output is no terminal.
        is_live: whether it shows a display that is updated in place, which needs the true width of the terminal.
    """
    from rich.console import Console  # here: programs that print no table start faster

    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not is_live:
        console.width = max(console.width, NARROWEST) if console.file.isatty() else width
    return console


def is_interactive(stderr: bool = False) -> bool:
    """Whether the stream is a terminal that can update a display in place."""
    console = make_console(stderr=stderr, is_live=True)
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class ProgressBar:
    """Progress of work that takes long: a bar in a terminal, elsewhere a line of the log at most every ten seconds.

    It is a context manager, or ended by `close`.

    Args:
        what: the name of the work. total: number of its steps. done: steps that are done already.
        quiet: show nothing, as on other ranks than the first.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, quiet: bool = False):
        self.what, self.total, self.done, self.quiet = what, total, done, quiet
        self.last = time.monotonic()
        self.bar: Any = None
        if not quiet and is_interactive(stderr=True):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
