"""Jobs as processes of the standard library's fork server, which imports everything once (Linux).

The launcher starts the server, and the server forks the jobs. A killed launcher takes the server with it, and the
server takes the jobs (prctl, see `die_with`). Every job leads a process group: when it ends, the launcher kills what is
left of the group, such as the other ranks and the workers that load data. A job over several devices is a new command
under a small process that watches the launcher, because Lightning's ranks repeat the command line.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from anomalib_lite.cli import signals
from anomalib_lite.sweeps.command import Command, die_with
from anomalib_lite.sweeps.job import Job

log = logging.getLogger(__name__)
GRACE = 8.0  # seconds in which interrupted jobs may end by themselves
FORK = sys.platform == "linux"  # elsewhere a fork of a process that has imported torch is unsafe: a job starts anew
LOST = 255  # exit code of multiprocessing for a process whose fork server was killed


class ForkedJobs:
    """Starts jobs on this machine and reports which have ended."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["anomalib_lite.sweeps.preload"] if FORK else [])
        self.running: dict[int, Any] = {}
        self.lost: dict[int, int] = {}
        self.started: dict[int, float] = {}  # when a job's process existed; the first one waits for the imports

    def start(self, job: Job, command: Command) -> None:
        command = replace(command, environment=command.full_environment())
        process = self.context.Process(target=run_job, args=(command, FORK and not job.several))
        begin, first = time.monotonic(), not self.started
        if first and FORK:
            log.info("the libraries are imported once for all jobs, which can take half a minute")
        try:
            process.start()  # waits until the fork server has imported everything
        except (EOFError, OSError):  # the fork server was killed before it forked the job
            self.lost[job.number] = -signal.SIGKILL
            return
        self.running[job.number], self.started[job.number] = process, time.monotonic()
        if first and FORK:
            log.info("the libraries took %.1f s, which counts for no job", self.started[job.number] - begin)

    def wait(self, seconds: float) -> dict[int, int]:
        """Wait until a job ends, at most `seconds`.

        Returns:
            {job number: exit code} of all jobs that have ended since the last call; negative for a signal
        """
        ended, self.lost = self.lost, {}
        ready = wait([process.sentinel for process in self.running.values()], 0 if ended else seconds)
        for number, process in list(self.running.items()):
            if process.sentinel in ready:
                process.join()
                kill_group(process.pid)
                ended[number] = -signal.SIGKILL if process.exitcode == LOST else process.exitcode
                del self.running[number]
        return ended

    def close(self) -> None:
        """End the jobs that still run: with a checkpoint at their next batch, then by force."""
        try:
            for process in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
            end = time.monotonic() + GRACE
            for process in self.running.values():
                process.join(max(0.0, end - time.monotonic()))
        finally:  # also after a second Ctrl-C
            for process in self.running.values():
                process.kill()  # it may not lead its group yet
                kill_group(process.pid)
            self.running = {}


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def run_job(command: Command, fork: bool) -> None:
    """Run a job in this process, or as a new command that this process watches. Runs in a process of the fork server.

    The exit code is the job's; a job that was killed by a signal kills this process with the same signal.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.stop_ignoring()
    multiprocessing.set_start_method(None, force=True)  # the job's own workers start as they do in a single run
    os.environ.clear()
    os.environ.update(command.environment)
    if fork:
        die_with(os.getppid())
        launcher: Any = multiprocessing.parent_process()
        if launcher.is_alive():
            train(command)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=end_with_launcher, daemon=True).start()
    code = command()["code"]
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(1 if code == LOST else code)


def train(command: Command) -> None:
    """Run the program in this process, with its output in the job's folder."""
    from anomalib_lite import train as program

    with command.sole_output() as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [str(program.__file__), *command.resuming_arguments()]
    try:
        program.main()
    except SystemExit as end:
        sys.exit(1 if end.code == LOST else end.code)
    finally:
        atexit._run_exitfuncs()  # processes of multiprocessing skip them


def end_with_launcher() -> None:
    """Kill this process and its group when the launcher or the fork server ends."""
    launcher: Any = multiprocessing.parent_process()
    launcher.join()
    os.killpg(0, signal.SIGKILL)
