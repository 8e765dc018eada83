"""The exception for errors that a user can cause and fix."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

#: messages of PyTorch and its libraries, on CPUs and GPUs
NO_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory|bad_alloc|ALLOC_FAILED")
#: where no algorithm's workspace fits, but also where cuDNN does not work at all
NO_ALGORITHM = re.compile("nable to find an engine|valid cuDNN algorithm")


class UserError(Exception):
    """One line that names the file, field or option and says what to do; the programs print it and exit with 2."""


class ImageSizeError(UserError):
    """The model can't take images of one size, while it may take others: the rest of the images can be scored."""


@contextlib.contextmanager
def explained_memory(message: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error, on any device, into a UserError with the text `message()`, which says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch has no common class for it
        text, reason = f"{type(error).__name__} {error}", "out of memory"
        if NO_ALGORITHM.search(text):
            reason += f", or a cuDNN that does not fit this PyTorch ({str(error).splitlines()[0]})"
        elif not isinstance(error, MemoryError) and not NO_MEMORY.search(text):
            raise
        raise UserError(f"{reason}: {message()}") from error


def enough_memory(
    option: Callable[[], str], cfg: dict[str, Any], cache: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """`explained_memory` for a batch size, which `option()` names. `cache`: as in result.json."""

    def message() -> str:
        group, key = option().split(".")
        size = cache.get("gpu_gb")
        table = f", or hardware.feature_gpu_gb=0 (the features' table takes {size} GB)" if size else ""
        return (
            f"{option()}={cfg[group][key]} images of this size are too many for this device; give a smaller one, or a "
            f"smaller data.image_size{table}"
        )

    return explained_memory(message)
