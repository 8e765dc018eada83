"""Exported files: ONNX, also with 8-bit weights and activations, and torch.export's .pt2; both with their metadata."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from anomalib_lite.errors import UserError
from anomalib_lite.exporting.graph import LARGE, quiet

Scorer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # uint8 [B, H, W, 3] -> scores [B], maps [B, h, w]
NAMES = {"input_names": ["images"], "output_names": ["score", "map"]}
LIMIT = 1.9 * 2**30  # bytes: an ONNX file is one protobuf message, which holds less than 2 GiB
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def check_installed() -> None:
    """Raise UserError unless the packages that write and run ONNX files are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx imports it
    except ImportError as error:
        raise UserError(
            f"output: {error.name} is not installed; pip install 'anomalib-lite[export]', or give output=FILE.pt2"
        ) from error


def write_onnx(program: ExportedProgram, file: Path, metadata: dict[str, Any], what: str) -> None:
    """Write the program as ONNX. Raises UserError for an operation that ONNX lacks, and for a model over 2 GiB."""
    import onnx

    size = sum(x.nbytes for x in program.state_dict.values())
    if size > LIMIT:
        raise UserError(
            f"output={file.name}: the model takes {size / 2**30:.1f} GiB, and an ONNX file holds less than 2; give "
            "output=FILE.pt2, or train with a smaller backbone or fewer images"
        )
    try:
        with quiet(), contextlib.redirect_stdout(sys.stderr):
            model = torch.onnx.export(program, dynamo=True, verbose=False, **NAMES).model_proto  # type: ignore
    except Exception as error:  # the exporter raises exceptions of its own and of onnxscript
        line = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"run: method={what} can't be written as ONNX ({line}); give output=FILE.pt2") from error
    onnx.helper.set_model_props(model, texts(metadata))
    file.write_bytes(model.SerializeToString())


def write_int8(source: Path, file: Path, images: Iterable[np.ndarray]) -> None:
    """Quantise an ONNX file's convolutions and products with stored weights: int8 weights per channel, uint8 inputs.

    The ranges of the inputs are the smallest and the largest values over `images`, uint8 [1, H, W, 3]. Weights use 7
    bits, since processors without VNNI add two products in 16 bits. Image preparation and smoothing stay exact.
    """
    import onnx
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> Any:
            return next(({"images": image} for image in self.images), None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        ort.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)  # joins batch norms
        model = onnx.load(prepared)
        large = {x.name for x in model.graph.initializer if np.prod(x.dims) >= LARGE}
        nodes = [x.name for x in model.graph.node if x.op_type in WEIGHTED and len(x.input) > 1 and x.input[1] in large]
        ort.quantize_static(
            prepared, file, Reader(), per_channel=True, reduce_range=True, nodes_to_quantize=nodes,
            op_types_to_quantize=list(WEIGHTED), activation_type=ort.QuantType.QUInt8,
        )  # fmt: skip
    model, properties = onnx.load(file), {x.key: x.value for x in onnx.load(source).metadata_props}
    onnx.helper.set_model_props(model, properties)
    file.write_bytes(model.SerializeToString())


def write_pt2(program: ExportedProgram, file: Path, metadata: dict[str, Any]) -> None:
    """Write the program as torch.export.save does, with the metadata as its extra files."""
    with quiet():
        torch.export.save(program, file, extra_files=texts(metadata))


def texts(metadata: dict[str, Any]) -> dict[str, str]:
    """Every value as a text of JSON."""
    return {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}


def opened(file: Path) -> Scorer:
    """What a file computes, on the CPU."""
    if file.suffix == ".pt2":
        with quiet():
            module = torch.export.load(file).module()

        def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            with torch.no_grad():
                score, maps = module(torch.from_numpy(images))
            return score.numpy(), maps.numpy()

        return run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(NAMES["output_names"], {"images": images}))


def scores_of(scorer: Scorer, images: Iterable[np.ndarray]) -> np.ndarray:
    """Scores [N] of images uint8 [H_i, W_i, 3], one by one."""
    return np.array([scorer(image[None])[0][0] for image in images], np.float64)
