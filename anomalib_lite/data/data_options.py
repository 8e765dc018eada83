"""Checks of the DataModule's arguments that the schema can't make: which of them go together."""

from collections.abc import Mapping
from typing import Any

from anomalib_lite.errors import UserError

#: keys of the group `data` that are the reader's arguments
READER_KEYS = (
    "normal", "normal_test", "abnormal", "masks", "mask_defect", "test_fraction", "test_seed", "table",
)  # fmt: skip


def reader_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the reader. Raises TypeError for one that is none of READER_KEYS."""
    if unknown := options.keys() - set(READER_KEYS):
        raise TypeError(f"AnomalyDataModule.__init__() got an unexpected keyword argument '{min(unknown)}'")
    return options


def reader_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the group `data` that its reader takes."""
    return {key: data[key] for key in READER_KEYS if key in data}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError for the first arguments of the DataModule that do not go together. `cli.schema` has checked each
    of them alone.
    """
    if options["transform"] is not None and options["treatment"] == "texture":
        raise UserError("data.treatment=texture: goes without data.transform; give data.texture_size and data.augment")
    if options["tiling"] and options["treatment"] == "texture":
        raise UserError("data.tiling: goes without data.treatment=texture; give data.treatment=object")
    if options["tiling"] and options["transform"] is not None:
        raise UserError("data.tiling: goes without data.transform; give data.tiling.image_size and data.augment")
    if options["transform"] is not None and options["map_size"] == "original":
        raise UserError(
            "scoring.map_size=original: goes without data.transform, which may crop or turn the image; give "
            "scoring.map_size=null, or a size to which the transformed masks are resized"
        )
    if (
        options["copies"] > 1
        and not options["augment"]
        and options["corrupt"] is None
        and options["treatment"] == "object"
    ):
        raise UserError(f"data.copies={options['copies']}: all copies are equal; give data.augment too, or 1")
    functions = {"data.reader": options["reader"], "split": options["split"], "data.corrupt": options["corrupt"]}
    for option, value in functions.items():
        if not (callable(value) or (option != "data.reader" and value is None)):
            raise UserError(f"{option}={value} must be a _target_ with _partial_: true; see the files of conf/data")
