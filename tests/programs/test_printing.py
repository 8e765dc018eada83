"""Nothing that is printed changes an exit code or loses text: odd names, odd terminals, streams that nobody reads."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from anomalib_lite import compare, evaluate, predict, splits, train
from anomalib_lite.console import ProgressBar, is_interactive
from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.view import View, print_end
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

#: names that rich would take for markup, for an end of markup or for an emoji, and one outside ASCII
CATEGORIES = ("screw [new]", "[bold]", "a:smile:b", "Schraube größer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of all CATEGORIES, whose own name is odd too."""
    folder = tmp_path_factory.mktemp("printing")
    for category in CATEGORIES:
        make_mvtec(folder / "[red]data", category, train=2, good=1, defects={"cut": 1})
    run = folder / "[/x]"
    data = ("data=folder", f'data.root="{folder}/[red]data"', "data.category=all")
    outcome = runs.succeeded(runs.train("method=norm_occ_closed_form", *data, f'hydra.run.dir="{run}"'))
    assert_names(outcome.out, run)
    return run


def assert_names(text: str, *more: Path) -> None:
    for name in (*CATEGORIES, *map(str, more)):
        assert name in text


@contextlib.contextmanager
def printed_to(stream: Any) -> Iterator[None]:
    """stdout and stderr as the interpreter itself would have opened them on this stream."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "__stdout__", "stderr", "__stderr__"):
            patch.setattr(sys, name, stream)
        yield


def run_on(stream: Any, program: Any, *arguments: str | Path) -> int:
    """The exit code of a program that prints to this stream."""
    with runs.restored(), printed_to(stream):
        sys.argv = ["program", *map(str, arguments)]
        try:
            program.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    return 0


def commands(run: Path, folder: Path) -> list[tuple[Any, list[str]]]:
    """A command of every program; `train` prints the stored result of its finished run."""
    return [
        (train, ["resume=true", f'hydra.run.dir="{run}"']),
        (compare, [str(run), f"--csv={folder / 'runs.csv'}"]),
        (splits, ["--counts", "[/a]=20,größer=5", "split=exp100"]),
        (predict, [f"run={run}", f"input={run.parents[1] / '[red]data'}", f"output={folder / 'p'}", "category=[bold]"]),
        (evaluate, [f"run={run}", f"output={folder / '[/e]'}"]),
    ]


def test_ascii(finished, tmp_path):
    """Names outside ASCII are escaped, dashes become hyphens, and nothing is lost."""
    texts = []
    for number, (program, arguments) in enumerate(commands(finished, tmp_path)):
        with (tmp_path / f"{number}").open("w", encoding="ascii") as stream:
            assert run_on(stream, program, *arguments) == 0, (tmp_path / f"{number}").read_text()
        texts.append((tmp_path / f"{number}").read_text(encoding="ascii"))
    for text in texts[:3]:
        assert r"gr\xf6\xdfer" in text
    assert [name in text for name, text in (("[bold]", texts[0]), ("[/a]", texts[2]), ("[/e]", texts[4]))] == [True] * 3


def closed_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", 1, encoding="utf-8")


STREAMS: dict[str, Callable[[], Any]] = {
    "nobody reads": closed_pipe,
    "disk full": lambda: Path("/dev/full").open("w", encoding="utf-8"),  # noqa: SIM115
    "closed": lambda: None,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_output_that_gets_lost(kind, finished, tmp_path):
    """All programs do their work, and their exit codes say so."""
    for program, arguments in commands(finished, tmp_path):
        stream = STREAMS[kind]()
        assert run_on(stream, program, *arguments) == 0, program.__name__
        assert run_on(STREAMS[kind](), program, *arguments, "no_such.key=1") == 2, program.__name__
    assert all((tmp_path / name).exists() for name in ("runs.csv", "p/scores.csv", "[/e]/result.json"))


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A terminal of this width, and a function that reads what it got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))
    os.set_blocking(ours, False)

    def text() -> str:
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(ours, 10**6):
                parts.append(part)
        return b"".join(parts).decode()

    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        yield stream, text
    os.close(ours)


@pytest.mark.parametrize(("variable", "value"), [("TERM", "xterm"), ("TERM", "dumb"), ("NO_COLOR", "1")])
def test_narrow_terminal(variable, value, finished, tmp_path, monkeypatch):
    """Lines wrap, and no digit is cut off."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    with terminal(30) as (stream, text):
        for program, arguments in commands(finished, tmp_path)[:3]:
            assert run_on(stream, program, *arguments) == 0
        shown = text()
        with printed_to(stream):
            assert is_interactive() == is_interactive(stderr=True) == (value != "dumb")
    assert_names(shown.replace("\r\n", ""), finished)
    assert "…" not in shown
    assert not (variable == "NO_COLOR" and re.search(r"\x1b\[([\d;]*;)?[349]\d[m;]", shown))


def test_colours_wanted_in_a_pipe(finished, tmp_path, monkeypatch):
    """FORCE_COLOR, as many CI systems set it, makes no terminal of a file: the width is that of a file."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        assert run_on(stream, compare, finished) == 0
        with printed_to(stream):
            assert not is_interactive()
    assert_names((tmp_path / "out").read_text())


def test_progress_bar_shows_names_as_they_are(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with terminal(80) as (stream, text), printed_to(stream):
        with ProgressBar("[/x]", 2) as bar:
            assert isinstance(bar.bar, Progress)
            bar.step("[red]")
            bar.last = 0
            bar.step("[/y]")
        shown = text()
    assert "[/x]" in shown
    assert "[/y]" in shown


@pytest.mark.parametrize("columns", [12, 200])
def test_a_sweep(columns, tmp_path, monkeypatch):
    """Its display while it runs, and its table at the end."""
    monkeypatch.setenv("TERM", "xterm")
    plain = {"objective": None}
    jobs = [
        Job(number, [f"data.category={name}"], tmp_path / f"[{number}]", None, plain, 0, False, "running")
        for number, name in enumerate(CATEGORIES)
    ]
    with terminal(columns) as (stream, text), printed_to(stream):
        with View(tmp_path, jobs, 1) as view:
            view.update()
        for job in jobs:
            job.state, job.failure = "failed", "[/why]"
        print_end(tmp_path, jobs)
        shown = text()
    for name in (*CATEGORIES, "[3]", "[/why]"):
        assert name in shown.replace("\r\n", "")
