"""Access to the Hugging Face hub, the source of pretrained weights."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """If the hub does not answer, make its client read its cache only; otherwise the client retries for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the exceptions are of another library and change between versions
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def line_of(error: BaseException, number: int = 0) -> str:
    """The non-empty line `number` of an error's text (the last one if it has fewer), cut to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(number, len(lines) - 1)][:200]
