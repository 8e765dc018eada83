"""The exception for errors that a user can cause and fix."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

#: messages of PyTorch and its libraries, on CPUs and GPUs
NO_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|bad_alloc|ALLOC_FAILED")


class UserError(Exception):
    """One line that names the file, field or option and says what to do; the programs print it and exit with 2."""


@contextlib.contextmanager
def enough_memory(option: Callable[[], str], cfg: dict[str, Any]) -> Iterator[None]:
    """Turn an out-of-memory error, on any device, into a UserError that names the batch size `option()`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch has no common class for it
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(f"{type(error).__name__} {error}"):
            raise
        group, key = option().split(".")
        raise UserError(
            f"out of memory: {option()}={cfg[group][key]} images of this size are too many for this device; give a "
            "smaller one, or a smaller data.image_size"
        ) from error
