"""Write a trained run as one file that scores images without this package.

    python -m anomalib_lite.export run=DIR output=FILE.onnx [KEY=VALUE ...]

run=DIR             the folder of a finished run
output=FILE         FILE.onnx, for onnxruntime; beside it FILE.py is written, which scores images with numpy,
                    onnxruntime and pillow: python FILE.py IMAGE... (python FILE.py --help explains it)
                    FILE.pt2, for torch.export.load; neither file may exist yet
category=NAME       the file holds the threshold of this category alone (default: of all; required for a model of
                    several categories if its scores depend on the category, as those of ltad and ssae)
precision=float32   float32; float16: weights are stored with 16 bits, so the file is half as large, and computation
                    stays in float32; int8: weights and activations of convolutions and linear layers have 8 bits (ONNX
                    only; calibrated on normal training images)
force=false         true: write float16 or int8 however far the scores move

The file takes `images`, uint8 [B, H, W, 3] (RGB) of any size, and gives `score` [B] and `map` [B, h, w]. It holds the
resizing, the normalisation, the network, the smoothing and, as metadata in JSON, the thresholds, the categories, the
method, the protocol and the version. It computes in float32; a note says where the run's thresholds were found in
another precision. FILE.py leaves out images with more than 8 bits per channel: convert them to 8 bits first. predict
does so by itself, with a note.

float16 and int8 are compared on up to 64 of the run's normal training images. Their scores may move by a fifth of the
way from the median normal score to the threshold; otherwise nothing is written. The image AUROC on the run's test
images before and after is printed. It decides nothing.
"""

import sys
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import make_folder

DEFAULTS = {"category": None, "precision": "float32", "force": False, "debug": False}
TEXTS = ("run", "output", "category")
PRECISIONS = ("float32", "float16", "int8")


def main() -> None:
    cli.run_plain(export, __doc__, TEXTS)


def export(options: dict[str, Any]) -> None:
    options = checked(options)
    run, output = (Path(options[name]).expanduser() for name in ("run", "output"))
    print(f"exporting {run}; importing the libraries, which can take half a minute", flush=True)
    from anomalib_lite.exporting import files
    from anomalib_lite.exporting.export import export_run
    from anomalib_lite.runs.terminal import silence_libraries

    silence_libraries()
    if output.suffix == ".onnx":
        files.check_installed()
        if output.stem in {*sys.stdlib_module_names, "numpy", "onnxruntime", "PIL"}:
            raise UserError(
                f"output={output}: its runner {output.stem}.py would hide a module of this name; choose another name"
            )
    make_folder(output.parent, "output")
    for line in export_run(run, output, options["category"] or None, options["precision"], options["force"]):
        print(line, flush=True)


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options with defaults; UserError for an unknown, missing or invalid one, or files that exist already."""
    unknown = options.keys() - DEFAULTS.keys() - set(TEXTS)
    if unknown:
        raise UserError(f"{min(unknown)}: no such option; see --help")
    for name in ("run", "output"):
        if not options.get(name):
            raise UserError(f"{name}= is not set: give run=DIR output=FILE.onnx; see --help")
    options = DEFAULTS | options
    output = Path(options["output"]).expanduser()
    if output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"output={output}: give a file that ends in .onnx or .pt2")
    if options["precision"] not in PRECISIONS:
        raise UserError(f"precision={options['precision']}: choose {', '.join(PRECISIONS)}")
    if options["precision"] == "int8" and output.suffix == ".pt2":
        raise UserError("precision=int8: only ONNX files have it; give output=FILE.onnx")
    if not isinstance(options["force"], bool):
        raise UserError(f"force={options['force']}: give true or false")
    for file in (output, output.with_suffix(".py")) if output.suffix == ".onnx" else (output,):
        if file.exists():
            raise UserError(f"output={output}: {file} exists already; choose another name, or remove it")
    return options


if __name__ == "__main__":
    main()
