"""Evaluate a stored run again, without training, into a new folder.

    python -m anomalib_lite.evaluate run=DIR output=DIR [KEY=VALUE ...]

KEY is a key of the run's configuration that training does not depend on: scoring.*, hardware.*, data.root,
data.workers, data.eval_batch_size, data.image_memory_gb, data.check=thorough. All other values come from the run's
folder. Images of data=folder and data=table that were moved are given with data.normal, data.normal_test,
data.abnormal, data.masks or data.table. The list of a split and weights that were moved are given with split.path,
backbone.weights or backbone.name; their contents must be the same.

data.root=DIR                     where the data lie now; or another test set (CATEGORY/test/...) for the trained run,
                                  whose thresholds remain; the result says so
scoring.pixel_smooth=2            another smoothing of the maps (image_smooth: of the maps for the image score)
scoring.image_score=0.01          max, mean, or the mean of the top share of a map
scoring.fpr_limits=[0.3,0.1]      limits of the false positive rate for AUPRO
scoring.map_size=original         maps and masks are compared at each image's own size; or a side, [h,w], or null (the
                                  input's size)
scoring.threshold_images=null     thresholds come from all normal training images; or from so many of each category
hardware=cpu                      another choice of hardware: auto, cpu, gpu or ddp
hardware.devices=2                on several devices
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from anomalib_lite.cli import keys, signals
from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME, make_folder
from anomalib_lite.runs import folder, inputs, ranks
from anomalib_lite.runs.claim import claimed


def main() -> None:
    cli.run_plain(evaluate, __doc__, ("run", "output"))


def evaluate(options: dict[str, Any]) -> None:
    given = [options.pop(name, "") for name in ("run", "output")]
    if not all(given):
        raise UserError("give run=DIR, a run's folder, and output=DIR, the folder for the new results; see --help")
    run, output = (Path(path).expanduser() for path in given)
    from anomalib_lite.cli import schema

    checkpoint, config, names = folder.read_run(run)
    before = keys.flat(config)
    changeable = ", ".join((*schema.free("evaluate"), *schema.free("moved")))
    for key, value in sorted(options.items(), key=lambda option: "." in option[0]):  # choices before their options
        if key in keys.RENAMED:
            raise UserError(keys.new_name(key))
        if schema.is_free(key, "moved") and keys.lookup(config, key):
            value = inputs.with_absolute_path(key, str(value))
            if key != "split.path":  # the data's fingerprint tells whether a list is the same
                inputs.check_moved(key, keys.lookup(config, key), value, folder.stored_digests(run))
        elif not schema.is_free(key, "evaluate"):
            raise UserError(f"{key} can't be changed without training anew: change {changeable}")
        if f"{key}={value}" == "data.check=only":
            raise UserError("data.check=only: evaluates nothing; use it in training, or give fast or thorough")
        if keys.lookup(config, key, ...) is ...:
            raise UserError(f"{key}: the run's configuration has no such key")
        if key in folder.PLACES:
            value = folder.absolute_places(value)
        if (HOME / "conf" / key).is_dir():  # a choice such as hardware=cpu
            value = cli.composed([f"{key}={value}", "data.category=all"])[0][key]
        folder.assign_everywhere(config, key, value)
    schema.check(config)
    changed = [  # by a choice such as hardware=cpu; compare reads them
        override(key, value)
        for key, value in keys.flat(config).items()
        if key.partition(".")[0] in options and before.get(key, value) != value
    ]
    first = ranks.settle(config["hardware"])
    make_folder(output, "output")
    with claimed(output, "output") if first else contextlib.nullcontext():
        if folder.is_run(output) or folder.is_finished(output):
            what = "results" if folder.is_finished(output) else "a run"
            raise UserError(f"{output} already holds {what}: choose another output=DIR")

        print(f"evaluating {run}; importing the libraries, which can take half a minute", flush=True)
        from anomalib_lite.runs import terminal
        from anomalib_lite.runs.artifacts import read_result
        from anomalib_lite.runs.run import execute
        from anomalib_lite.runs.summary import other_precision

        overrides = [with_absolute_places(x, config) for x in sys.argv[1:] if "=" in x] + changed
        try:
            remark, other = f"evaluated again from {run.absolute()}", "data.root" in options
            result = execute(config, output, names, checkpoint, overrides, [remark], fit=False, may_differ=other)
        except SystemExit as error:
            raise signals.interruption(error) or error from None
    if result is not None:
        terminal.show(output, result)
        before = read_result(run) if folder.is_finished(run) else {}  # its test may have been killed
        tested, now = (each.get("environment", {}).get("precision") for each in (before, result))
        for note in other_precision(tested, now):
            print(f"note: {note}; hardware.precision=32 and bf16 choose one")


def override(key: str, value: Any) -> str:
    """KEY=VALUE, as a result has it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def with_absolute_places(argument: str, config: dict[str, Any]) -> str:
    """The argument; one that says where images are with the absolute paths of the configuration, since compare reads it
    in another folder.
    """
    key = argument.partition("=")[0]
    return override(key, keys.lookup(config, key)) if key in folder.PLACES else argument


if __name__ == "__main__":
    main()
