"""Locks of a sweep: one launcher works in its folder, one process in a job's folder."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib_lite.errors import UserError

PATIENCE = 10.0  # seconds that the previous sweep in the same folder may take to end
NONE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without locks, as Lustre without -o flock


def lock(file: Any, wait: bool = False) -> str | None:
    """Lock an open file until it is closed; NFS demands one that is open for writing.

    Returns:
        What the user should know: "" once the file is locked, or that its file system has no locks; None if another
        process holds the lock (only without `wait`).
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NONE:
            raise
        return f"this file system has no locks ({error.strerror}); start no second sweep in the same folder"
    return ""


@contextlib.contextmanager
def locked(place: Path) -> Iterator[str]:
    """Hold the lock on a file, which then names this process, so that one sweep at a time works in the file's folder.
    Yields what the user should know.

    Raises:
        UserError: another process has held it for PATIENCE seconds
    """
    end = time.monotonic() + PATIENCE
    with place.open("a+") as file:  # it must not be emptied before it is locked
        while (remark := lock(file)) is None:
            if time.monotonic() > end:
                raise UserError(
                    f"{place.parent}: another sweep works in it ({place.read_text().strip() or 'unknown process'}); "
                    "wait for its end, or choose another hydra.sweep.dir"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield remark
