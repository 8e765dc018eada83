"""Score new images with a trained run.

    python -m anomalib_lite.predict run=DIR input=IMAGE_OR_DIR output=DIR [KEY=VALUE ...]

run=DIR         the folder of a finished run; nothing else is needed
input=PATH      an image, or a folder (searched with its subfolders)
output=DIR      a folder for scores.csv (path, score, threshold, decision), heatmaps/ and overlays/; it must hold no
                scores.csv yet
category=NAME   the category whose thresholds are used; needed for a model of several categories
quantile=0.99   thresholds at this quantile over the run's normal training images (default: as in the run)
batch_size=32   images per batch
workers=0       processes that read the images
device=auto     auto, cpu or gpu

Exit codes: 0; 1 if some images could not be read (they are listed and left out); 2 for an error that you can fix.
"""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import make_folder, replacing
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.folder import HEATMAPS, OVERLAYS, SCORES, read_run

DEFAULTS = {"category": None, "quantile": None, "batch_size": 32, "workers": 0, "device": "auto", "debug": False}
TEXTS = ("run", "input", "output", "category")


def main() -> None:
    cli.run_plain(predict, __doc__, TEXTS)


def predict(options: dict[str, Any]) -> None:
    options = checked(options)
    run, source, output = (Path(options[name]).expanduser() for name in ("run", "input", "output"))
    checkpoint, cfg, _ = read_run(run)
    if source.is_dir() and output.absolute().is_relative_to(source.absolute()):
        raise UserError(
            f"output={output} lies inside input={source}: choose a folder outside, or its pictures are read next time"
        )
    files = images_below(source)
    refuse_used(output)

    print(f"scoring {len(files)} images; importing the libraries, which can take half a minute", flush=True)
    from anomalib_lite.data.value_range import other_depths
    from anomalib_lite.runs.artifacts import thresholds_of
    from anomalib_lite.runs.load import load
    from anomalib_lite.runs.terminal import silence_libraries

    silence_libraries()
    limits = thresholds_of(run, options["category"] or None, options["quantile"])
    model, data = load(checkpoint, cfg, options["device"])
    make_folder(output, "output")
    batches = data.new_dataloader(
        files, model.categories.index(limits["category"]), options["batch_size"], options["workers"]
    )
    bf16 = cfg["hardware"]["precision"] == "bf16"
    depths: list[tuple[str, str]] = []
    with claimed(output, "output"):
        refuse_used(output)  # once more: another process may have been faster
        left_out = write_predictions(output, scored(model, batches, bf16, len(files), depths), source, limits, data)
    print(
        f"{len(files) - len(left_out)} of {len(files)} images scored; {output}/ holds scores.csv, heatmaps/, overlays/"
    )
    for note in other_depths(data.pixels, depths):
        print(f"note: {note}")
    if left_out:
        for message in left_out:
            print(f"left out: {message}", file=sys.stderr)
        sys.exit(1)


def refuse_used(output: Path) -> None:
    if (output / SCORES).exists():
        raise UserError(f"{output / SCORES} exists already: choose another output=DIR, or remove the file")


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options with defaults; UserError for an unknown, missing or invalid one."""
    unknown = options.keys() - DEFAULTS.keys() - set(TEXTS)
    if unknown:
        raise UserError(f"{min(unknown)}: no such option; see --help")
    for name in ("run", "input", "output"):
        if not options.get(name):
            raise UserError(f"{name}= is not set: give run=DIR input=IMAGE_OR_DIR output=DIR; see --help")
    options = DEFAULTS | options
    for name, low in (("batch_size", 1), ("workers", 0)):
        number = options[name]
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise UserError(f"{name}={number}: give a whole number from {low}")
    if options["device"] not in ("auto", "cpu", "gpu"):
        raise UserError(f"device={options['device']}: choose auto, cpu or gpu")
    return options


def scored(
    model: Any, batches: Any, bf16: bool, count: int, depths: list[tuple[str, str]]
) -> Iterator[tuple[str, float, Any] | str]:
    """(path, score, map [H, W]) of every image, or the message that says why it has none.

    Adds (path, depth of its pixels) of the readable images to `depths`.
    """
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from anomalib_lite.progress import ProgressBar

    with ProgressBar("images", count) as bar:
        for batch in batches:
            yield from batch["damaged"]
            depths += zip(batch["path"], batch["depth"], strict=True)
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
    output: Path, predictions: Iterable[Any], source: Path, limits: dict[str, Any], data: Any
) -> list[str]:
    """scores.csv, heat maps and overlays; the messages of the images that have no score."""
    base, left_out = source if source.is_dir() else source.parent, []
    with replacing(output / SCORES) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "threshold", "decision"])
        for prediction in predictions:
            if isinstance(prediction, str):
                left_out.append(prediction)
                continue
            path, score, amap = prediction
            below = Path(path).relative_to(base)
            decision = "defective" if score > limits["image"] else "good"
            writer.writerow([below.as_posix(), repr(score), repr(limits["image"]), decision])
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


def images_below(source: Path) -> list[Path]:
    """The image itself, or all images below a folder, sorted, without hidden ones."""
    from anomalib_lite.data.image_files import IMAGE_SUFFIXES

    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"input={source}: no such file or folder")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts)]
    if not found:
        raise UserError(f"input={source}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


if __name__ == "__main__":
    main()
