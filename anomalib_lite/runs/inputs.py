"""Files that a run is made from: whether they exist, and beside its data, the split's list, the weights and the user's
own modules, whether those that have moved have the same contents.

Keys with `free=("moved",)` in the schema may name another place on resume and evaluation. The SHA-256 of the contents
is stored with the run; runs of version 0.2 and before have none.
"""

import hashlib
from pathlib import Path
from typing import Any

from anomalib_lite.cli.keys import lookup
from anomalib_lite.errors import UserError
from anomalib_lite.runs import own_modules
from anomalib_lite.runs.own_modules import key_of

LOCAL = "local-dir:"  # precedes the folder of a timm model in backbone.name


def check_inputs(config: dict[str, Any]) -> None:
    """Raise UserError if the data's folder or table, the split's file or the weights' file does not exist.

    What loads them reports the same errors, after PyTorch was imported, which takes up to half a minute. Readers from
    outside the package are not judged.
    """
    from anomalib_lite.data.mvtec_layout import existing_root

    data, backbone, split = config["data"], config["backbone"], config["split"] or {}
    reader = str(data["reader"]["_target_"]) if isinstance(data["reader"], dict) else ""
    needs_root = reader.startswith("anomalib_lite.data.") and not reader.endswith((".read_synthetic", ".read_table"))
    if needs_root and not data.get("normal"):  # it stands instead of a root
        existing_root(data["root"])
    for key, path in (("data.table", data.get("table")), ("split.path", split.get("path"))):
        if isinstance(path, str) and not Path(path).expanduser().exists():
            raise UserError(f"{key}={path}: no such file")
    weights, is_ours = backbone["weights"], str(backbone.get("_target_")).endswith("features.backbones.Backbone")
    if is_ours and backbone["name"] and weights not in ("auto", "none") and not Path(weights).expanduser().is_file():
        raise UserError(f"backbone.weights={weights}: no such file; give a weights file, auto, or none")


def path_of(key: str, value: Any) -> Path | None:
    """The value of a key that may name a file or a folder; None if it is the name of something else, such as auto."""
    if not isinstance(value, str) or value in ("auto", "none"):
        return None
    path = Path(value.removeprefix(LOCAL)).expanduser().absolute()
    if key != "backbone.name" or value.startswith(LOCAL):
        return path
    return path if "/" in value and (path.is_dir() or value.startswith(("/", "~"))) else None


def with_absolute_path(key: str, value: Any) -> Any:
    """The value of such a key, with an absolute path if it names a file or a folder."""
    path = path_of(key, value)
    return value if path is None else f"{LOCAL if value.startswith(LOCAL) else ''}{path}"


def digests(config: dict[str, Any], before: dict[str, str]) -> dict[str, str]:
    """{key: SHA-256} of the files and folders that the configuration names; those `before` where one is gone.

    Those of the user's own modules stay those `before`: what changed since the start is noted, see `own_modules`.
    """
    from anomalib_lite.cli.schema import free

    paths = {key: path_of(key, lookup(config, key)) for key in free("moved")}
    found = {key: digest(path) if path else None for key, path in paths.items()}
    own = {key_of(name): value for name, value in own_modules.digests(config).items()}
    own |= {key: value for key, value in before.items() if key in own}
    return {key: value for key in paths if paths[key] and (value := found[key] or before.get(key))} | own


def digest(path: Path) -> str | None:
    """The SHA-256 of a file, or of the files in a folder with their names; None where the path leads to nothing."""
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            whole.update(f"{file.name if path.is_dir() else ''}\t{content}\n".encode(errors="surrogateescape"))
    except OSError:
        return None
    return whole.hexdigest()


def check_moved(key: str, before: Any, after: Any, stored: dict[str, str]) -> None:
    """UserError unless the path `after` leads to the content that the run was made from, at `before`.

    Args:
        stored: the run's digests.
    """
    old, new = path_of(key, before), path_of(key, after)
    if before == after:
        return
    alike = str(before).startswith(LOCAL) == str(after).startswith(LOCAL)
    if old is None or new is None or not alike or key not in stored:
        why = "the run stored no hash of its content" if old and new and alike else "another kind of value"
        raise UserError(f"{key}={after}: the run was made with {before} ({why}); give the same value, or leave it out")
    found = digest(new)
    if found is None:
        raise UserError(f"{key}={after}: no such file or folder; give the place where {before} lies now")
    if found != stored[key]:
        raise UserError(f"{key}={after}: another content than {before} had when the run started; give the same file")
