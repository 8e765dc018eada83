"""Checks of the DataModule's arguments: what the schema can't know, and what loaders would report in other words."""

from collections.abc import Mapping
from typing import Any

from anomalib_lite.errors import UserError

#: keys of the group `data` that are the reader's arguments
READER_KEYS = (
    "normal", "normal_test", "abnormal", "masks", "mask_defect", "test_fraction", "test_seed", "table",
)  # fmt: skip


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the reader. Raises TypeError for one that is none of READER_KEYS."""
    if unknown := options.keys() - set(READER_KEYS):
        raise TypeError(f"AnomalyDataModule.__init__() got an unexpected keyword argument '{min(unknown)}'")
    return options


def reader_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the group `data` that its reader takes."""
    return {key: data[key] for key in READER_KEYS if key in data}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError for the first invalid argument of the DataModule."""
    for option in ("batch_size", "eval_batch_size", "copies"):
        value = options[option]
        if not isinstance(value, int) or value < 1:
            raise UserError(f"data.{option}={value}: give a whole number from 1")
    if options["workers"] != "auto" and (not isinstance(options["workers"], int) or options["workers"] < 0):
        raise UserError(f"data.workers={options['workers']}: give a number of processes from 0, or auto")
    for option, choices in (("check", ("fast", "thorough")), ("treatment", ("auto", "object", "texture"))):
        if options[option] not in choices:
            raise UserError(f"data.{option}={options[option]}: choose {' or '.join(choices)}")
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
    limits = options["value_range"]
    if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
        raise UserError(f"data.value_range={list(limits)}: give [low, high], or null")
    for option, value in (
        ("data.reader", options["reader"]),
        ("split", options["split"]),
        ("data.corrupt", options["corrupt"]),
    ):
        if not (callable(value) or (option != "data.reader" and value is None)):
            raise UserError(f"{option}={value} must be a _target_ with _partial_: true; see the files of conf/data")
