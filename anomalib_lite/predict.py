"""Score new images with a trained run.

    python -m anomalib_lite.predict run=DIR input=PATH output=DIR [KEY=VALUE ...]

run=DIR         the folder of a finished run; nothing else is needed
input=PATH      an image, a folder (searched with its subfolders), or a pattern ('dir/*.png', '**/a?.jpg'); or a list of
                these: 'input=[first,second/*.png]'
output=DIR      a folder for scores.csv (path, score, threshold, decision), heatmaps/ and overlays/; it must hold no
                scores.csv yet
category=NAME   the category whose thresholds are used; needed for a model of several categories
quantile=0.99   thresholds at this quantile over the run's normal training images (default: as in the run)
batch_size=32   images per batch; of a run with data.tiling, tiles per batch, and at most as many as in the run
workers=0       processes that read the images
device=auto     auto, cpu or gpu

Paths in scores.csv are below the folder that all inputs share.
Exit codes: 0; 1 if some images were left out because they could not be read (they are listed); 2 for an error that you
can fix.
"""

import csv
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import make_folder, readable, replacing
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.folder import HEATMAPS, OVERLAYS, SCORES, read_run

DEFAULTS = {"category": None, "quantile": None, "batch_size": 32, "workers": 0, "device": "auto", "debug": False}
TEXTS = ("run", "input", "output", "category")


def main() -> None:
    cli.run_plain(predict, __doc__, TEXTS)


def predict(options: dict[str, Any]) -> None:
    options = checked(options)
    run, output = (Path(options[name]).expanduser() for name in ("run", "output"))
    checkpoint, cfg, _ = read_run(run)
    found = inputs_of(options["input"])
    for folder in found.folders:
        if output.absolute().is_relative_to(folder.absolute()):
            raise UserError(
                f"output={output} lies inside input={folder}: choose a folder outside, or its pictures are read next "
                "time"
            )
    refuse_used(output)

    print(f"scoring {len(found.images)} images; importing the libraries, which can take half a minute", flush=True)
    from anomalib_lite.data.value_range import other_depths, outside
    from anomalib_lite.runs.artifacts import thresholds_of
    from anomalib_lite.runs.load import load
    from anomalib_lite.runs.terminal import silence_libraries

    silence_libraries()
    limits = thresholds_of(run, options["category"] or None, options["quantile"])
    if cfg["data"].get("tiling"):  # images come one by one, and their tiles in batches
        cfg["data"]["eval_batch_size"] = min(options["batch_size"], cfg["data"]["eval_batch_size"])
    model, data = load(checkpoint, cfg, options["device"])
    make_folder(output, "output")
    batches = data.new_dataloader(
        found.images, model.categories.index(limits["category"]), options["batch_size"], options["workers"]
    )
    bf16 = cfg["hardware"]["precision"] == "bf16"
    left_out, count = list(found.left_out), len(found.images)
    headers: dict[str, Any] = {}
    with claimed(output, "output"):
        refuse_used(output)  # once more: another process may have been faster
        left_out += write_predictions(output, scored(model, batches, bf16, count, headers), found.base, limits, data)
    scored_count = len(found.images) + len(found.left_out) - len(left_out)
    left_out += [
        f"{path}: images 2 to {header.pages} of this file; save each as a file"
        for path, header in headers.items()
        if header.pages > 1
    ]
    total = count + len(found.left_out)
    print(f"{scored_count} of {total} images scored; {output}/ holds scores.csv, heatmaps/, overlays/")
    notes = other_depths(data.pixels, [(path, header.depth) for path, header in headers.items()])
    notes += outside(data.pixels, [Path(path) for path, header in headers.items() if header.depth != "8-bit"])
    for note in notes:
        print(f"note: {note}")
    if found.others:
        print(f"note: {len(found.others)} files are no images (first: {found.others[0]})")
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
    for name, low in (("batch_size", 1), ("workers", 0)):
        number = options[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise UserError(f"{name}={number}: give a whole number from {low}")
    if options["device"] not in ("auto", "cpu", "gpu"):
        raise UserError(f"device={options['device']}: choose auto, cpu or gpu")
    return options


def scored(
    model: Any, batches: Any, bf16: bool, count: int, headers: dict[str, Any]
) -> Iterator[tuple[str, float, Any] | str]:
    """(path, score, map [H, W]) of every image, or the message that says why it has none.

    Adds the readable images' headers to `headers`, by path.
    """
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from anomalib_lite.progress import ProgressBar

    with ProgressBar("images", count) as bar:
        for batch in batches:
            yield from batch["damaged"]
            headers |= zip(batch["path"], batch["headers"], strict=True)
            if batch["path"]:
                autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
                with torch.inference_mode(), autocast:
                    found = model.predict_step(move_data_to_device(batch, model.device), 0)
                for path, amap, score in zip(batch["path"], found["map"], found["score"].tolist(), strict=True):
                    if torch.isfinite(amap).all():
                        yield path, score, amap.float().cpu().numpy()
                    else:
                        yield f"{path}: its anomaly map is not finite; check that the run was trained well"
            bar.step(count=len(batch["path"]) + len(batch["damaged"]))


def write_predictions(
    output: Path, predictions: Iterable[Any], base: Path, limits: dict[str, Any], data: Any
) -> list[str]:
    """scores.csv, heat maps and overlays; the messages of the images that have no score."""
    left_out = []
    with replacing(output / SCORES) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "threshold", "decision"])
        for prediction in predictions:
            if isinstance(prediction, str):
                left_out.append(prediction)
                continue
            path, score, amap = prediction
            below = Path(path).relative_to(base)
            decision = "defective" if score > limits["image"] else "good"
            writer.writerow([readable(below.as_posix()), repr(score), repr(limits["image"]), decision])
            draw(output, below, data.eval_pipeline.load(base / below), amap, limits)
    return left_out


def draw(output: Path, below: Path, image: Any, amap: Any, limits: dict[str, Any]) -> None:
    """heatmaps/ and overlays/ of the image [H, W, 3], at its size, under the name `below` with its suffix."""
    import cv2

    from anomalib_lite.runs.heat_maps import colours, overlay

    amap = cv2.resize(amap, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    for folder, picture in ((HEATMAPS, colours(amap, limits)), (OVERLAYS, overlay(image, amap, limits))):
        file = output / folder / f"{below}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


class Inputs(NamedTuple):
    """What `input=` names.

    Attributes:
        images: the files to be scored, each once.
        folders: the folders that were searched.
        base: the folder that all inputs share: results are named by the paths below it.
        left_out: messages about what may be an image but can't be read.
        others: files that are no images.
    """

    images: list[Path]
    folders: list[Path]
    base: Path
    left_out: list[str]
    others: list[Path]


def inputs_of(text: str) -> Inputs:
    """An image, a folder, a pattern, or a list of these. Raises UserError for a path that does not exist."""
    from anomalib_lite.data.image_files import IMAGE_SUFFIXES
    from anomalib_lite.data.image_folders import classified, walk

    images, folders, left_out, others = list[Path](), list[Path](), list[str](), list[Path]()
    for each in listed(text):
        path = Path(each).expanduser()
        exists = os.path.lexists(path)
        if exists and not path.is_dir():  # a file that is named is tried, whatever its suffix
            images.append(path)
            continue
        matches = classified([path] if exists else sorted(map(Path, glob.glob(str(path), recursive=True))))  # noqa: PTH207
        if not exists and not any(matches):
            raise UserError(f"input={each}: no such file or folder")
        folders += matches.folders
        for part in (matches, *map(walk, matches.folders)):
            images += part.images
            left_out += [f"{name}: {message}" for name, message in part.unread.items()]
            others += part.others
    if not images:
        why = f"; {left_out[0]}" if left_out else ""
        raise UserError(f"input={text}: holds no image ({', '.join(IMAGE_SUFFIXES)}){why}")
    place = {each: each.resolve() if ".." in each.parts else each.absolute() for each in [*images, *folders]}
    base = os.path.commonpath([place[each] if each in folders else place[each].parent for each in place])
    unique = {place[each]: each for each in reversed(images)}
    return Inputs(sorted(unique), folders, Path(base), left_out, others)


def listed(text: str) -> list[str]:
    """The elements of [a,b] or ["a, b",c]; the text itself if it is no list, or if a file of this name exists."""
    if os.path.lexists(text) or not (text.startswith("[") and text.endswith("]")):
        return [text]
    elements = next(csv.reader([text[1:-1]], skipinitialspace=True), [])
    if not all(each.strip() for each in elements) or not elements:
        raise UserError(f"input={text}: give paths, as in input=[first,second]")
    return [each.strip() for each in elements]


if __name__ == "__main__":
    main()
