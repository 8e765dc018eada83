"""Several ranks of a program on this machine, started as torchrun or SLURM would start them."""

import multiprocessing
import os
import socket
from typing import Any

from tests.helpers import run_programs as runs

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["anomalib_lite.runs.run", "tests.helpers.run_programs", "albumentations"])


def on_ranks(program: str, options: list[str], ranks: int, *more: list[str]) -> None:
    """Run `train` or `evaluate` with these options on some ranks, all of which must succeed.

    `more`: the options of further runs, which the same processes do one after the other.
    """
    started = start_ranks(program, options, ranks, *more)
    for process in started:
        process.join(90 * (1 + len(more)))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * ranks


def start_ranks(program: str, options: list[str], ranks: int, *more: list[str]) -> list[Any]:
    """The processes of the ranks; one whose program fails exits with 1."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    started: list[Any] = []
    for rank in range(ranks):
        environment = shared | {"LOCAL_RANK": str(rank)}
        started.append(PROCESSES.Process(target=_program, args=(program, [options, *more], environment)))
        started[-1].start()
    return started


def in_forks(count: int, function: Any, *arguments: Any) -> None:
    """`function(rank, *arguments)` in so many processes, all of which must succeed.

    They are forks of this process, which import nothing anew. A fork can't use torch's threads: the function sets their
    number to 1.
    """
    forks = multiprocessing.get_context("fork")
    started = [forks.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _program(program: str, each: list[list[str]], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for options in each:
        outcome = runs.train(*options, small=False) if program == "train" else runs.evaluate(*options)
        if outcome.code:
            print(options, outcome.out, outcome.err)
            os._exit(1)
