"""Whether W&B's server takes a run, and the command that uploads a run to it later."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NO_KEY = "no API key is configured"


def sync_command(parts: Iterable[Path], *options: str) -> str:
    """The command that uploads parts of a run, which are folders of W&B: one for each resumption."""
    return shlex.join(["wandb", "sync", *options, *sorted(map(str, parts))])


def online_obstacle(settings: Any, seconds: float) -> str:
    """Why an online run would not work: no key, or a server that does not answer or refuses the key; "" if it would.

    W&B itself finds out by many attempts. One plain request takes milliseconds.
    """
    import requests
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            return NO_KEY
    except wandb.Error as error:
        return one_line(error)
    if not settings.api_key:
        return ""  # another kind of identification
    url, question = settings.base_url.rstrip("/"), {"query": "query { viewer { id } }"}
    try:
        answer = requests.post(f"{url}/graphql", json=question, auth=("api", settings.api_key), timeout=seconds)
    except requests.exceptions.SSLError:
        return ""  # W&B has its own certificates
    except requests.RequestException as error:
        return f"{url} can't be reached ({type(error).__name__})"
    if answer.status_code in (401, 403):
        return f"{url} refuses the key"
    return "" if answer.ok else f"{url} answers {answer.status_code}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
