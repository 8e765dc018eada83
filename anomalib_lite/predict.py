"""Score new images with a trained run.

    python -m anomalib_lite.predict run=DIR input=PATH output=DIR [KEY=VALUE ...]

run=DIR         the folder of a finished run; nothing else is needed, with two exceptions: the file of a method of your
                own, which is looked for in the current folder, in PYTHONPATH, and where it lay when the run was
                started; and the configuration of a backbone from a folder or the hub (local-dir:, hf_hub:, clip, align)
input=PATH      an image, a folder (searched with its subfolders), or a pattern ('dir/*.png', '**/a?.jpg'); or a list of
                these: 'input=[first,second/*.png]'
output=DIR      a folder for scores.csv (path, score, threshold, decision, ratio), report.html, heatmaps/ and overlays/;
                it must hold no scores.csv yet
category=NAME   the category whose thresholds are used; needed for a model of several categories
quantile=0.99   thresholds at this quantile over the run's normal training images, or over its held-out images if
                that is larger (default: as in the run)
threshold=0.5   a threshold of your own for the scores, in place of a quantile
report=50       number of images on the page report.html at most, highest scores first; 0: no page
watch=true      (or --watch) score the images in the folder, then new ones as they arrive, until Ctrl-C or SIGTERM; the
                input is a folder or a list of folders, which may be empty
batch_size=32   images per batch; of a run with data.tiling, tiles per batch, and at most as many as in the run
workers=0       processes that read the images
device=auto     auto, cpu or gpu
precision=auto  auto (bf16 where the machine computes in it), 32 or bf16 (default: as in the run's configuration)

Paths in scores.csv are below the folder that all inputs share. The ratio is the score over the threshold. It is empty
unless the threshold is above 0. report.html needs no network and no other file. In heatmaps/ and overlays/, a picture
has its image's whole name with .png added (overlays/a.jpg.png for a.jpg), so that a.jpg and a.png have one each. Where
the run's data.transform does more than resize, such as a crop, the pictures show the transformed image.
A watched file is scored once it has not changed for a second, and again when it is replaced. A file that can't be
decoded is tried for ten seconds. Each score is one more row of scores.csv, so the last row of a path counts; the column
`modified` (the file's time of change, in ns) tells the next start with the same output which files are scored already.
Exit codes: 0, also of a watch that is ended; 1 if some images were left out because they could not be read or have a
size that the run can't take (they are listed); 2 for an error that you can fix.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import make_folder, readable, replacing
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.folder import HEATMAPS, OVERLAYS, REPORT, SCORES, read_run
from anomalib_lite.runs.prediction_inputs import Inputs, inputs_of, refuse_inside, watched_folders
from anomalib_lite.runs.prediction_table import COLUMNS

DEFAULTS = {
    "category": None, "quantile": None, "threshold": None, "report": 50, "watch": False, "batch_size": 32, "workers": 0,
    "device": "auto", "precision": None, "debug": False,
}  # fmt: skip
TEXTS = ("run", "input", "output", "category")


def main() -> None:
    cli.run_plain(predict, __doc__, TEXTS, flags=("watch",))


def predict(options: dict[str, Any]) -> None:
    options = checked(options)
    run, output = (Path(options[name]).expanduser() for name in ("run", "output"))
    checkpoint, cfg, names = read_run(run)
    found = (watched_folders if options["watch"] else inputs_of)(options["input"])
    refuse_inside(output, found.folders, options["watch"])
    if not options["watch"]:
        refuse_used(output)
        print(f"{found.total} images found; ", end="")
    print("importing the libraries, which can take half a minute", flush=True)
    from anomalib_lite.runs.artifacts import read_result, thresholds_of
    from anomalib_lite.runs.load import load
    from anomalib_lite.runs.predictions import Predictor
    from anomalib_lite.runs.terminal import silence_libraries
    from anomalib_lite.runs.watching import watch

    silence_libraries()
    limits = thresholds_of(run, options["category"] or None, options["quantile"])
    source = "of your own"
    if options["threshold"] is None:
        source = f"{limits['quantile']:g} quantile of {limits['images']} normal training images"
        source += f" or of {limits['held_out']} held-out ones, whichever is larger" if limits.get("held_out") else ""
    else:
        limits["image"] = float(options["threshold"])
    about = {
        "threshold": f"{limits['image']:.6g} ({source})", "method": names["method"], "category": limits["category"],
        "run": str(run), "input": options["input"],
    }  # fmt: skip
    if cfg["data"].get("tiling"):  # images come one by one, and their tiles in batches
        cfg["data"]["eval_batch_size"] = min(options["batch_size"], cfg["data"]["eval_batch_size"])
    wanted = cfg["hardware"]["precision"] = options["precision"] or cfg["hardware"]["precision"]
    model, data = load(checkpoint, cfg, options["device"])
    make_folder(output, "output")
    with claimed(output, "output"):
        predictor = Predictor(
            model,
            data,
            limits,
            output,
            found.base,
            options["batch_size"],
            options["workers"],
            options["report"],
            {name: readable(text) for name, text in about.items()},
        )
        if options["watch"]:
            used = {"run": str(run.resolve()), "category": limits["category"], "threshold": limits["image"]}
            watch(predictor, found.folders, used | {"input": [str(folder) for folder in found.folders]})
            return
        refuse_used(output)  # once more: another process may have been faster
        score_all(predictor, found, read_result(run)["environment"].get("precision"), wanted)


def score_all(predictor: Any, found: Inputs, tested: str | None, wanted: str | int) -> None:
    """Score the images that there are, and exit with 1 if some had to be left out.

    Args:
        tested: the precision of the run's test, as in result.json. wanted: hardware.precision.
    """
    from anomalib_lite.runs.summary import other_precision, precision

    left_out, output = list(found.left_out), predictor.output
    with replacing(output / SCORES) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for each in predictor.scored(found.images):
            if isinstance(each, str):
                left_out.append(each)
            else:
                writer.writerow(each[1].row())
    scored_count = found.total - len(left_out)
    pages, notes = predictor.remarks()
    left_out += pages
    predictor.report.write(output, left_out)
    parts = [SCORES, *([REPORT] * bool(predictor.report.most)), f"{HEATMAPS}/", f"{OVERLAYS}/"]
    print(f"{scored_count} of {found.total} images scored; {output}/ holds {', '.join(parts)}")
    now = precision(wanted, predictor.model, predictor.model.device)  # known once the networks have run
    notes += [f"{note}; precision=32 and precision=bf16 choose one" for note in other_precision(tested, now)]
    if found.others:
        notes.append(f"{len(found.others)} files are no images (first: {found.others[0]})")
    for note in notes:
        print(f"note: {note}")
    if left_out:
        for message in left_out:
            print(f"left out: {message}", file=sys.stderr)
        sys.exit(1)


def refuse_used(output: Path) -> None:
    if (output / SCORES).exists():
        raise UserError(f"{output / SCORES} exists already: choose another output=DIR")


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options with defaults; UserError for an unknown, missing or invalid one."""
    unknown = options.keys() - DEFAULTS.keys() - set(TEXTS)
    if unknown:
        raise UserError(f"{min(unknown)}: no such option; see --help")
    for name in ("run", "input", "output"):
        if not options.get(name):
            raise UserError(f"{name}= is not set: give run=DIR input=PATH output=DIR; see --help")
    options = DEFAULTS | options
    for name, low in (("batch_size", 1), ("workers", 0), ("report", 0)):
        number = options[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise UserError(f"{name}={number}: give a whole number from {low}")
    if options["device"] not in ("auto", "cpu", "gpu"):
        raise UserError(f"device={options['device']}: choose auto, cpu or gpu")
    if options["precision"] not in (None, "auto", 32, "bf16"):
        raise UserError(f"precision={options['precision']}: choose auto, 32 or bf16")
    if not isinstance(options["watch"], bool):
        raise UserError(f"watch={options['watch']}: give true or false")
    threshold = options["threshold"]
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise UserError(f"threshold={threshold}: give a number, such as 0.5")
        if options["quantile"] is not None:
            raise UserError(f"threshold={threshold} and quantile={options['quantile']}: give one of them")
    return options


if __name__ == "__main__":
    main()
