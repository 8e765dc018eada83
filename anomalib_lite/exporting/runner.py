"""Score images with the model beside this file: python FILE.py [category=NAME] IMAGE...

It needs numpy, onnxruntime and pillow. It prints path,score,threshold,decision.
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
            raise OSError("more than 8 bits per channel; convert it to 8 bits")
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]


def main(arguments: list[str]) -> int:
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(Path(__file__).with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    thresholds = json.loads(session.get_modelmeta().custom_metadata_map["thresholds"])
    chosen = [each.partition("=")[2] for each in arguments if each.startswith("category=")] or list(thresholds)
    if len(chosen) != 1 or chosen[0] not in thresholds:
        sys.exit(f"error: category=NAME: give one of {', '.join(thresholds)}")
    threshold, code = thresholds[chosen[0]]["image"], 0
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["path", "score", "threshold", "decision"])
    for path in arguments:
        if not path.startswith("category="):
            try:
                score = float(session.run(["score"], {"images": read(path)})[0][0])
                rows.writerow([path, repr(score), repr(threshold), "defective" if score > threshold else "good"])
            except OSError as error:
                print(f"left out: {path}: {error}", file=sys.stderr)
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
