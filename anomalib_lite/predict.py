"""Score new images with a trained run.

    python -m anomalib_lite.predict run=DIR input=IMAGE_OR_DIR output=DIR [KEY=VALUE ...]

run=DIR         the folder of a finished run; nothing else is needed
input=PATH      an image, or a folder (searched with its subfolders)
output=DIR      gets scores.csv (path, score, threshold, decision), heatmaps/ and overlays/
category=NAME   whose thresholds hold, for a model of several categories
quantile=0.99   the thresholds: this quantile over the run's normal training images (default: the run's)
batch_size=32   images a batch
workers=0       processes that read images
device=auto     auto, cpu or gpu

Exit codes: 0; 1 if some images could not be read (they are named and left out); 2 for an error that is yours to mend.
"""

import csv
import sys
from pathlib import Path
from typing import Any

from anomalib_lite import cli, configuration
from anomalib_lite.errors import UserError

DEFAULTS = {"category": None, "quantile": None, "batch_size": 32, "workers": 0, "device": "auto", "debug": False}


def main() -> None:
    cli.run_plain(predict, __doc__)


def predict(options: dict[str, Any]) -> None:
    unknown = options.keys() - DEFAULTS.keys() - {"run", "input", "output"}
    if unknown:
        raise UserError(f"{min(unknown)}: no such option; see --help")
    for name in ("run", "input", "output"):
        if not options.get(name):
            raise UserError(f"{name}= is not set: give run=DIR input=IMAGE_OR_DIR output=DIR; see --help")
    run, source, output = (Path(str(options[name])).expanduser() for name in ("run", "input", "output"))
    options = DEFAULTS | options
    for name, low in (("batch_size", 1), ("workers", 0)):
        if not isinstance(options[name], int) or options[name] < low:
            raise UserError(f"{name}={options[name]}: give a whole number from {low}")
    files = images_below(source)
    checkpoint, cfg, _ = configuration.read_run(run)
    output.mkdir(parents=True, exist_ok=True)

    import cv2
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from anomalib_lite.callbacks import Bar, quiet
    from anomalib_lite.data.samples import load_rgb
    from anomalib_lite.experiment import load
    from anomalib_lite.figures import colours, overlay
    from anomalib_lite.results import thresholds_of

    quiet()
    limits = thresholds_of(run, options["category"], options["quantile"])
    model, data = load(checkpoint, cfg, options["device"])
    category = model.categories.index(limits["category"])
    base, bar = source if source.is_dir() else source.parent, Bar("images", len(files))
    damaged: list[str] = []
    with (output / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "threshold", "decision"])
        for batch in data.new_dataloader(files, category, options["batch_size"], options["workers"]):
            damaged += batch["damaged"]
            if batch["path"]:
                with torch.inference_mode():
                    scored = model.predict_step(move_data_to_device(batch, model.device), 0)
                maps, scores = scored["map"].cpu().numpy(), scored["score"].tolist()
                for file_name, amap, score in zip(batch["path"], maps, scores, strict=True):
                    below = Path(file_name).relative_to(base)
                    decision = "defective" if score > limits["image"] else "good"
                    writer.writerow([below.as_posix(), repr(score), repr(limits["image"]), decision])
                    image = load_rgb(base / below)
                    amap = cv2.resize(amap, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
                    save(output / "heatmaps" / f"{below}.png", colours(amap, limits))
                    save(output / "overlays" / f"{below}.png", overlay(image, amap, limits))
            bar.step(count=len(batch["path"]) + len(batch["damaged"]))
    bar.close()
    done = len(files) - len(damaged)
    print(f"{done} images scored; {output}/ holds scores.csv, heatmaps/, overlays/")
    if damaged:
        for message in damaged:
            print(f"left out: {message}", file=sys.stderr)
        sys.exit(1)


def save(file: Path, picture: Any) -> None:
    import cv2

    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), picture[..., ::-1])


def images_below(source: Path) -> list[Path]:
    """The image itself, or all images below a folder, sorted, without hidden ones."""
    from anomalib_lite.data.readers import EXTENSIONS

    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"input={source}: no such file or folder")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts)]
    if not found:
        raise UserError(f"input={source}: holds no image ({', '.join(sorted(EXTENSIONS))})")
    return found


if __name__ == "__main__":
    main()
