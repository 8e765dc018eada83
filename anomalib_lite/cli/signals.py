"""Ctrl-C, SIGTERM and the warning signals of clusters end a program; training writes a checkpoint first."""

import atexit
import contextlib
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: of `docker stop`, scancel and spot machines; of a closed terminal; of `sbatch --signal`, before the time limit
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_CODE = 143
WAIT = b"\nCtrl-C: the run writes a checkpoint after this batch and ends; a second Ctrl-C ends it at once\n"

_in_program = False
_deferred = False
_received: list[int] = []  # the signals that came while signals were deferred
_ignored: list[int] = []  # the signals that a fork server ignores and its jobs do not


class Stopped(KeyboardInterrupt):
    """The process received one of SIGNALS."""

    def __init__(self, text: str):
        super().__init__(text)


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise Stopped in the block when one of SIGNALS comes, and KeyboardInterrupt at Ctrl-C, as soon as no code defers
    them. A signal that the process ignores or handles already is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _in_program
    if not _in_program:
        atexit.unregister(_kill_children)
        atexit.register(_kill_children)  # it runs before what multiprocessing.util has registered at its import
    _in_program = True
    with _handled_by(_stop, lambda handler: handler in (signal.SIG_DFL, signal.default_int_handler)):
        try:
            yield
        finally:
            _in_program = False
            release(silently=True)


@contextlib.contextmanager
def _handled_by(new: Callable[[int, Any], None], replaces: Callable[[Any], bool]) -> Iterator[None]:
    """In the block, `new` handles SIGNALS and Ctrl-C in place of the handlers that it `replaces`."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number, handler in before.items():
        if replaces(handler):
            signal.signal(number, new)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by another program than Python
                signal.signal(number, handler)


class Request:
    """Whether the user asked the program to end."""

    made = False


@contextlib.contextmanager
def as_request() -> Iterator[Request]:
    """In the block, Ctrl-C and SIGNALS only make the request, so that nothing is interrupted half way; a second Ctrl-C
    interrupts. In another thread than the main one, no request is made.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def stop(number: int, frame: object) -> None:
        if request.made and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.made = True

    with _handled_by(stop, lambda handler: handler not in (None, signal.SIG_IGN)):
        yield request


def _stop(number: int, frame: object) -> None:
    if not _deferred or (number == signal.SIGINT and number in _received):
        raise _interrupt(number)
    if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, WAIT)  # not print: the signal may have come within a print
    _received.append(number)


def _interrupt(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(f"interrupted by {signal.Signals(number).name}")


def defer() -> None:
    """From now on signals wait for `release`, except a second Ctrl-C."""
    global _deferred
    _deferred = True


def received() -> bool:
    """Whether a signal waits."""
    return bool(_received)


def release(silently: bool = False) -> None:
    """Signals wait no longer. Raises the interruption for the first one that has waited, unless `silently`."""
    global _deferred
    waited, _deferred = _received[:1], False
    _received.clear()
    if waited and not silently:
        raise _interrupt(*waited)


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C or Stopped behind an exception: Lightning turns it into an exit with code 1."""
    found = (each for each in (error, error.__context__) if isinstance(each, KeyboardInterrupt))
    return next(found, None)


def leave_to_parent() -> None:
    """For processes that load data: a signal to all processes must not end them before the one that trains.

    Only in our programs, which kill these processes at their end: multiprocessing sends SIGTERM and waits.
    """
    for number in (*SIGNALS, signal.SIGINT) if _in_program else ():
        signal.signal(number, signal.SIG_IGN)


def leave_to_launcher() -> None:
    """For a sweep's fork server: a signal to all processes, as when a terminal closes, must not end it, because its
    jobs are killed with it. The launcher interrupts the jobs.
    """
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
            _ignored.append(number)


def stop_ignoring() -> None:
    """For a job of the fork server: signals end it again. What the launcher itself ignores, as with nohup, stays so."""
    while _ignored:
        signal.signal(_ignored.pop(), signal.SIG_DFL)


def _kill_children() -> None:
    """At the end of the program, before multiprocessing waits for processes of abandoned iterators."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an exception
    for child in children:
        child.kill()
