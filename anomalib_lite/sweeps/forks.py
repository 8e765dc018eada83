"""Processes for a sweep's jobs. A server that has imported everything forks them, so that the imports are paid once.

Three kinds of processes hang together by two pipes: the launcher writes requests, and the server's end of them closes
with the launcher, however it ends; the server then ends its jobs. A job dies with the server (Linux), or is killed by
the launcher, which sees the server's pipe close. Every job leads a process group, which takes its ranks along.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

#: imported before the jobs, so that they needn't, beside the package's methods. Imports alone: no GPU is touched, and
#: of threads there are only those of NumPy's and SciPy's OpenBLAS, which ends them before a fork and begins anew after
PRELOADED = (
    "anomalib_lite.train", "anomalib_lite.cli.schema", "anomalib_lite.runs.run", "anomalib_lite.data.readers",
    "anomalib_lite.data.corruptions", "albumentations", "wandb",
)  # fmt: skip
#: of a process that is a rank itself; a job is none
RANK = (
    "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PL_GLOBAL_SEED", "HYDRA_MAIN_MODULE",
)  # fmt: skip
GRACE = 8.0  # seconds that jobs have to end by themselves
FORK = sys.platform == "linux"  # elsewhere a fork of what torch has imported isn't safe: every job starts anew


class Server:
    """The launcher's end: starts jobs, says which have ended."""

    def __init__(self, log: Path, lock: int):
        requests, self._requests = os.pipe()
        self._reports, reports = os.pipe()
        environment = {key: value for key, value in os.environ.items() if key not in RANK}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "anomalib_lite.sweeps.forks", *map(str, (requests, reports, os.getpid()))],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                pass_fds=(requests, reports, lock),
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
            )
        os.close(requests)
        os.close(reports)
        self._text = b""
        self._jobs: dict[int, int | None] = {}  # those begun, with their process groups
        self.began: dict[int, float] = {}  # when a job's process was there: the first one waits for the imports
        self._closed = False

    def start(self, job: Any, arguments: list[str], environment: dict[str, str]) -> None:
        """Run `python -m anomalib_lite.train ARGUMENTS`, in a fork of the server or, over several devices, as a new
        command: Lightning's ranks repeat it."""
        self._jobs[job.number] = None
        request = {"job": job.number, "arguments": arguments, "output": str(job.output), "environment": environment}
        self._send(request | {"fork": not job.several})

    def _send(self, request: dict[str, Any]) -> None:
        data = json.dumps(request).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # wait() tells of it
            while data:
                data = data[os.write(self._requests, data) :]

    def wait(self, seconds: float) -> dict[int, int]:
        """{job: exit code} of the jobs that ended meanwhile; a signal's number is negative.

        Raises:
            EOFError: the server is gone, and with it all jobs.
        """
        ended = {}
        if select.select([self._reports], [], [], seconds)[0]:
            data = os.read(self._reports, 65536)
            if not data:
                self.kill()
                raise EOFError
            *lines, self._text = (self._text + data).split(b"\n")
            for report in map(json.loads, lines):
                if "code" in report:
                    ended[report["job"]] = report["code"]
                    self._jobs.pop(report["job"])
                else:
                    self._jobs[report["job"]] = report["process"]
                    self.began[report["job"]] = time.monotonic()
        return ended

    def close(self) -> None:
        """End the jobs that still run, cleanly if they can, and the server."""
        if self._closed:
            return
        self._closed = True
        os.close(self._requests)
        if not any(self._jobs.values()):
            self.kill()  # it may be importing: no need to wait for that
        try:
            self.process.wait(2 * GRACE + 5)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C
            self.kill()
        os.close(self._reports)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for group in self._jobs.values():
            if group is not None:
                kill_group(group)
        self._jobs.clear()


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


# --- the server's end ---


def serve(requests: int, reports: int, launcher: int) -> None:
    os.set_inheritable(requests, False)
    os.set_inheritable(reports, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(launcher)  # at once while it imports and has no jobs to end
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    jobs: dict[int, int] = {}  # process: job
    text = b""
    while True:
        ready = select.select([requests, wake], [], [])[0]
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            for process, code in reap(jobs):
                report(reports, {"job": jobs.pop(process), "code": code})
        if requests not in ready:
            continue
        data = os.read(requests, 65536)
        *lines, text = (text + data).split(b"\n")
        for request in map(json.loads, lines):
            if FORK and request["fork"]:
                preload()
            if os.getppid() != launcher:
                data = b""  # nobody waits for this job any more
                break
            die_with(launcher, None)
            server = os.getpid()
            process = os.fork()
            if process == 0:
                become(request, (requests, reports, wake, woken), server)
            with contextlib.suppress(OSError):  # it may have done so itself
                os.setpgid(process, process)
            jobs[process] = request["job"]
            report(reports, {"job": request["job"], "process": process})
        if not data:
            return stop(jobs)


def report(reports: int, what: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(reports, json.dumps(what).encode() + b"\n")


def reap(jobs: dict[int, int]) -> list[tuple[int, int]]:
    """The processes that have ended, with their codes; whatever is left of their groups is killed."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            if process in jobs:
                kill_group(process)
                ended.append((process, os.waitstatus_to_exitcode(status)))
    return ended


def stop(jobs: dict[int, int]) -> None:
    """As Ctrl-C would, then by force."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        end = time.monotonic() + patience
        for process in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        while jobs and time.monotonic() < end:
            for process, _ in reap(jobs):
                jobs.pop(process)
            time.sleep(0.02)


def preload() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from hydra.core.plugins import Plugins

    from anomalib_lite import methods

    Plugins.instance()
    for name in (
        *PRELOADED,
        *(module.name for module in pkgutil.iter_modules(methods.__path__, "anomalib_lite.methods.")),
    ):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # a job that needs it tells
                importlib.import_module(name)


# --- a job's process ---


def become(request: dict[str, Any], pipes: tuple[int, ...], parent: int) -> NoReturn:
    """Turn a fork of the server into a job: its own group, signals, files and environment."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        die_with(parent)
        for pipe in pipes:
            os.close(pipe)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ.update(request["environment"])
        if not (FORK and request["fork"]):
            command = [sys.executable, "-m", "anomalib_lite.train", *request["arguments"]]
            os.execv(sys.executable, command)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = train(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def train(arguments: list[str]) -> int:
    from anomalib_lite import train

    sys.argv = [str(train.__file__), *arguments]
    try:
        train.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def die_with(parent: int, number: signal.Signals | None = signal.SIGKILL) -> None:
    """Get this signal when the parent ends. Linux alone knows how; elsewhere the pipes do it, later."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number or 0)
        if number and os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
