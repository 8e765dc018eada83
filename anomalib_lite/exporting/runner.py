"""Score images with the model beside this file.

    python FILE.py [category=NAME] IMAGE...

It needs FILE.onnx in the same folder, and the packages numpy, onnxruntime and pillow.
category=NAME chooses whose threshold is used; it is needed where FILE.onnx holds several categories.
It prints the columns path,score,threshold,decision. Images with more than 8 bits per channel are left out.
Exit codes: 0; 1 if some images were left out because they could not be read (they are listed); 2 for a wrong command.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # large images are the user's own


def read(path: str) -> np.ndarray:
    """The image as uint8 [1, H, W, 3], upright RGB."""
    with Image.open(path) as image:
        if image.mode[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
            raise OSError("more than 8 bits per channel; convert it to 8 bits, as predict does by itself")
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]


def main(arguments: list[str]) -> int:
    usage = (__doc__ or "").strip().replace("FILE", Path(__file__).stem)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    options = [each for each in arguments if is_option(each)]
    images = [each for each in arguments if each not in options]
    unknown = [each for each in options if not each.startswith("category=")]
    if unknown:
        return failed(f"{unknown[0]}: no such option, and no such file; see --help")
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(Path(__file__).with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    thresholds = json.loads(session.get_modelmeta().custom_metadata_map["thresholds"])
    chosen = [each.partition("=")[2] for each in options] or list(thresholds)
    if len(chosen) != 1 or chosen[0] not in thresholds:
        return failed(f"category=NAME: give one of {', '.join(thresholds)}")
    if not images:
        return failed("IMAGE: no image is given; see --help")
    threshold, code = thresholds[chosen[0]]["image"], 0
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["path", "score", "threshold", "decision"])
    for path in images:
        try:
            score = float(session.run(["score"], {"images": read(path)})[0][0])
            rows.writerow([path, repr(score), repr(threshold), "defective" if score > threshold else "good"])
        except Exception as error:  # of a damaged file Pillow raises also ValueError and SyntaxError
            print(f"left out: {path}: {error}", file=sys.stderr)
            code = 1
    return code


def is_option(argument: str) -> bool:
    """Whether it is written as an option, -x or name=value, and no file has this name."""
    key, equals, _ = argument.partition("=")
    written = argument.startswith("-") or (equals and key.isidentifier())
    return argument.startswith("category=") or (bool(written) and not Path(argument).exists())


def failed(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
