"""The command that runs one job of a sweep, and how a process runs it. Every launcher uses it, on any machine."""

import contextlib
import ctypes
import fcntl
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from hydra._internal.utils import get_args_parser

from anomalib_lite.runs.folder import is_run

#: environment variables of a process that is a rank of a run; a job starts without them
RANK_VARIABLES = (
    "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PL_GLOBAL_SEED", "HYDRA_MAIN_MODULE",
)  # fmt: skip


@dataclass
class Command:
    """`python -m anomalib_lite.train ARGUMENTS` for one job.

    A command can be pickled: the fork server, submitit and Ray call it on the machine that runs the job.
    """

    arguments: list[str]
    folder: Path  # of the job
    environment: dict[str, str]  # the variables that differ from those of the calling process
    home: Path = field(default_factory=Path.cwd)  # relative paths begin here, and a user's method file lies here
    grace: float = 5.0  # seconds that the process may take to write a checkpoint when it must end
    process: Any = field(default=None, init=False, compare=False)  # while it runs

    def __call__(self) -> dict[str, Any]:
        """Run the job as a new process and wait for it.

        Returns:
            {"code": exit code, negative for a signal; "seconds": how long the job ran}
        """
        with self.sole_output() as output:
            started, parent = time.time(), os.getpid()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "anomalib_lite.train", *self.resuming_arguments()],
                cwd=self.home,
                env=self.full_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: die_with(parent),
            )
            try:
                # with a time limit the process is not locked while it is waited for: `checkpoint` comes in between
                code = self.process.wait(threading.TIMEOUT_MAX)
            except BaseException:  # Ctrl-C, or the time limit of the job
                self.stop()
                raise
            finally:
                self.process = None
        return {"code": code, "seconds": time.time() - started}

    def stop(self) -> None:
        """End the process: it writes a checkpoint at its next batch."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.grace)
        self.process.kill()

    @contextlib.contextmanager
    def sole_output(self) -> Iterator[IO[bytes]]:
        """Open output.log and lock it: only one job at a time works in a folder.

        The job of a killed launcher may still work there; the job that replaces it waits here. All processes of a job
        inherit the lock together with the file. Under SLURM only the first rank takes it, because the ranks share it.
        On a file system without locks (Lustre without -o flock) the job starts at once, and output.log says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.log").open("ab") as output:
            is_first = os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or os.environ["SLURM_PROCID"] == "0"
            if is_first:
                try:
                    fcntl.flock(output, fcntl.LOCK_EX)
                except OSError as error:
                    text = f"{self.folder}: this file system has no locks ({error.strerror}); the job starts at once"
                    output.write(f"{text}, although a job of a killed launcher may still work here\n".encode())
                    output.flush()
            yield output

    def resuming_arguments(self) -> list[str]:
        """The arguments; with resume=true if an earlier process has started the run in this folder."""
        started = is_run(self.folder)
        return [*self.arguments, *["resume=true"] * (started and "resume=true" not in self.arguments)]

    def full_environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES} | self.environment

    def checkpoint(self) -> Any:
        """Called by submitit, in its handler of SIGUSR2, shortly before SLURM ends the job: it writes a checkpoint.
        Then submitit queues it again.
        """
        if self.process is not None:
            self.stop()
        return importlib.import_module("submitit.helpers").DelayedSubmission(replace(self))  # without the process

    __submitit_checkpoint__ = checkpoint  # its name in later versions of submitit


def die_with(parent: int) -> None:
    """Let the system kill this process when the process `parent` ends. Only Linux offers this."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os._exit(1)


def config_flags() -> list[str]:
    """The flags of the sweep's own command line that name the place of configurations."""
    known = get_args_parser().parse_known_args()[0]
    names = ("config_path", "config_name", "config_dir")
    return [
        part for name in names if (value := getattr(known, name)) for part in (f"--{name.replace('_', '-')}", value)
    ]


def quoted(path: Path) -> str:
    """A path as the value of a Hydra override."""
    return '"' + str(path).replace('"', '\\"') + '"'
