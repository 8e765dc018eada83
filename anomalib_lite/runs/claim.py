"""One process at a time works in a folder: it holds a lock, which the system releases however the process ends."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib_lite.errors import UserError
from anomalib_lite.runs.folder import CLAIM

PATIENCE = 2.0  # seconds that a process that was just killed may take to end


@contextlib.contextmanager
def claimed(folder: Path, option: str, name: str = CLAIM, patience: float | None = None) -> Iterator[None]:
    """Hold an existing folder for this process. `option` names the folder on the command line.

    A record lock on the file `name` also holds on NFS, and processes forked from this one do not inherit it. Where a
    file system has no locks, the file itself is the claim, because only one process can create it; the file of a
    process of this machine that has ended is removed.

    Args:
        patience: seconds that the process that holds the folder may take to end; None: PATIENCE.

    Raises:
        UserError: another process holds the folder; the line names the process and its machine.
    """
    file, end = folder / name, time.monotonic() + (PATIENCE if patience is None else patience)
    while (descriptor := _take(file)) is None:
        if time.monotonic() > end:
            holder = _holder(file)
            since = f" since {holder['since']}" if holder.get("since") else ""
            raise UserError(
                f"{folder}: process {holder.get('pid', '?')} on {holder.get('host', '?')} works in this folder{since}; "
                f"wait for its end, choose another {option}=DIR, or remove {file} if that process is gone"
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # before the lock is released: later it may be another process's file
        os.close(descriptor)


def _take(file: Path) -> int | None:
    """The open, locked file, which names this process; None if another process has it."""
    created = True
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        created = False
        try:
            descriptor = os.open(file, os.O_RDWR)
        except FileNotFoundError:  # its holder has just ended
            return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = os.path.samestat(os.fstat(descriptor), file.stat())  # else its holder has just removed it
    except (BlockingIOError, PermissionError, FileNotFoundError):
        taken = False
    except OSError:  # a file system without locks
        taken = created
        if not created and _has_ended(_holder(file)):
            file.unlink(missing_ok=True)
    if not taken:
        os.close(descriptor)
        return None
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode())
    return descriptor


def _holder(file: Path) -> dict[str, Any]:
    """What the file says of the process that wrote it; empty where it says nothing."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process is one of this machine and exists no more."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:  # also where it is another user's
        return isinstance(error, ProcessLookupError)
    return False
