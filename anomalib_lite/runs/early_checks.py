"""What can be refused before PyTorch is imported, which takes up to half a minute: missing folders and files."""

from pathlib import Path
from typing import Any

from anomalib_lite.data.mvtec_layout import existing_root
from anomalib_lite.errors import UserError


def check_inputs(config: dict[str, Any]) -> None:
    """Raise UserError if the data's folder, the split's file or the weights' file does not exist.

    What loads them reports the same errors; this check is earlier. Readers from outside the package are not judged.
    """
    data, backbone, split = config["data"], config["backbone"], config["split"] or {}
    reader = data["reader"]["_target_"] if isinstance(data["reader"], dict) else ""
    if str(reader).startswith("anomalib_lite.data.readers.") and not data.get(
        "normal"
    ):  # which stands instead of a root
        existing_root(data["root"])
    if isinstance(path := split.get("path"), str) and not Path(path).expanduser().exists():
        raise UserError(f"split.path={path}: no such file")
    weights, is_ours = backbone["weights"], str(backbone.get("_target_")).endswith("features.backbones.Backbone")
    if is_ours and backbone["name"] and weights not in ("auto", "none") and not Path(weights).expanduser().is_file():
        raise UserError(f"backbone.weights={weights}: no such file; give a weights file, auto, or none")
