"""SIGTERM and the warning signals of clusters end a program as Ctrl-C does; training writes a checkpoint first."""

import atexit
import contextlib
import multiprocessing.util
import signal
import threading
from collections.abc import Iterator

#: of `docker stop`, scancel and spot machines; of a closed terminal; of `sbatch --signal`, before the time limit
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_CODE = 143

_in_program = False
_deferred = False
_received = ""  # the name of the signal that came while signals were deferred


class Stopped(KeyboardInterrupt):
    """The process received one of SIGNALS."""

    def __init__(self, text: str):
        super().__init__(text)


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise Stopped in the block when one of SIGNALS comes, except where the process ignores or handles it already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _in_program
    if not _in_program:
        atexit.unregister(_kill_children)
        atexit.register(_kill_children)  # it runs before what multiprocessing.util has registered at its import
    _in_program = True
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number in SIGNALS:
        if before[number] == signal.SIG_DFL:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        _in_program = False
        release(silently=True)
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

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number, handler in before.items():
        if handler not in (None, signal.SIG_IGN):
            signal.signal(number, stop)
    try:
        yield request
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    global _received
    if not _deferred:
        raise Stopped(f"interrupted by {signal.Signals(number).name}")
    _received = _received or signal.Signals(number).name


def defer() -> None:
    """From now on signals wait for `release`; Ctrl-C does not."""
    global _deferred
    _deferred = True


def received() -> bool:
    """Whether a signal waits."""
    return bool(_received)


def release(silently: bool = False) -> None:
    """Signals wait no longer. Raises Stopped for one that has waited, unless `silently`."""
    global _deferred, _received
    name, _deferred, _received = _received, False, ""
    if name and not silently:
        raise Stopped(f"interrupted by {name}")


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C or Stopped behind an exception: Lightning turns it into an exit with code 1."""
    found = (each for each in (error, error.__context__) if isinstance(each, KeyboardInterrupt))
    return next(found, None)


def leave_to_parent() -> None:
    """For processes that load data: a signal to all processes must not end them before the one that trains.

    Only in our programs, which kill these processes at their end: multiprocessing sends SIGTERM and waits.
    """
    for number in SIGNALS if _in_program else ():
        signal.signal(number, signal.SIG_IGN)


def _kill_children() -> None:
    """At the end of the program, before multiprocessing waits for processes of abandoned iterators."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an exception
    for child in children:
        child.kill()
