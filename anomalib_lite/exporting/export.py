"""From a run's folder to an exported file that has been compared with the run."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_lite import __version__
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import Sample
from anomalib_lite.data.transforms import Resize
from anomalib_lite.errors import UserError
from anomalib_lite.exporting import files
from anomalib_lite.exporting.graph import HalfWeights, ScoringGraph, check_exportable, reads_category, traced
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.functional import image_metrics
from anomalib_lite.paths import replacing
from anomalib_lite.runs import build
from anomalib_lite.runs.artifacts import read_normal, read_result, read_scores
from anomalib_lite.runs.checkpoints import read_checkpoint
from anomalib_lite.runs.folder import read_run
from anomalib_lite.runs.load import LoadedRun, load
from anomalib_lite.runs.run import check_fingerprint
from anomalib_lite.runs.summary import TF32, other_precision

REFERENCE = "predict's in float32 (precision=32)"  # the scores that a file's are compared with
NORMAL_IMAGES = 64  # of the training images that calibrate and check a file
SAME = 1e-3  # relative difference of scores that no float32 file exceeds; more is a fault
#: The score of a normal image may move by this share of the way from the median of the normal images' scores to the
#: threshold. So a usual normal image stays good, and the order of images changes only among nearly equal scores.
TOLERANCE = 0.2


def export_run(run: Path, output: Path, category: str | None, precision: str, force: bool = False) -> Iterator[str]:
    """Write `output` (.onnx or .pt2), and beside an ONNX file its runner; give lines on what was found.

    Args:
        category: the category whose threshold the file holds; None: all of the run's.
        precision: "float32"; "float16": weights are stored with 16 bits; "int8": ONNX, 8-bit weights and activations.
        force: write the file however far the scores move.

    Raises:
        UserError: the run can't be exported, or its scores move too far.
    """
    checkpoint, cfg, names = read_run(run)
    result = read_result(run)
    cfg["hardware"]["precision"] = "32"
    stored = read_checkpoint(checkpoint, cfg)
    model, data = load(checkpoint, cfg, "cpu")
    check_exportable(cfg, stored, data)
    chosen = chosen_categories(model, data, category, names["method"])
    thresholds = {name: result["thresholds"]["per_category"][name] for name in chosen}
    about = metadata(model, data, thresholds, names["method"], result["thresholds"]["quantile"])
    reference = LoadedRun(model, data, {"category": chosen[0]})
    for note in threshold_notes(result["environment"].get("precision")):
        yield f"note: {note}"

    images: list[np.ndarray] = noise(model.image_size)
    if precision != "float32":
        samples, data = normal_samples(cfg, stored, checkpoint, chosen, precision)
        images = [data.eval_pipeline.load(sample.path) for sample in samples]
    index = model.categories.index(chosen[0]) if len(chosen) == 1 else None
    graph: torch.nn.Module = ScoringGraph(model, data, index).eval()
    graph = HalfWeights(graph) if precision == "float16" else graph
    program = traced(graph, example(model, data), names["method"], own_sizes=data.test_size == "original")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"model{output.suffix}"
        if output.suffix == ".pt2":
            files.write_pt2(program, made, about)
        else:
            files.write_onnx(program, made, about, names["method"])
        if precision == "int8":
            quantised = Path(folder) / "int8.onnx"
            files.write_int8(made, quantised, (image[None] for image in images))
            made = quantised
        scorer, expected = files.opened(made), reference.predict(images)[0].astype(np.float64)
        found = files.scores_of(scorer, images)
        if precision == "float32":
            difference = largest_difference(found, expected)
            if not difference <= SAME:
                raise UserError(
                    f"run: method={names['method']} can't be exported: the file's scores differ from {REFERENCE} "
                    f"by {difference:.2g} of their value; use predict, or load_run in Python"
                )
            yield f"the file's scores differ from {REFERENCE} by at most {difference:.1e} of their value"
        else:
            yield check_moved(found, expected, room(run, thresholds), precision, force)
            yield auroc_line(run, data, chosen, scorer, data.eval_pipeline.load)
        with replacing(output) as part:
            shutil.copyfile(made, part)
    yield f"{output}: {output.stat().st_size / 1e6:.1f} MB, {precision}"
    if output.suffix == ".onnx":
        shutil.copyfile(Path(__file__).with_name("runner.py"), output.with_suffix(".py"))
        choice = "" if len(chosen) == 1 else " category=NAME"
        yield f"python {output.with_suffix('.py')}{choice} IMAGE... scores images with numpy, onnxruntime and pillow"


def threshold_notes(tested: str | None) -> list[str]:
    """A note if the run's thresholds come from scores of another precision than the file's float32.

    Args:
        tested: in which precision the run was tested, as result.json says; None: not known.
    """
    if tested is None or not other_precision(tested, "float32"):
        return []
    return [
        f"the run's thresholds were found in another precision ({tested.removesuffix(TF32)}) than the file's float32, "
        "where scores can differ by about 1 % and images near a threshold may be decided otherwise; for thresholds of "
        "float32 scores, train again with hardware.precision=32 and export that run"
    ]


def chosen_categories(model: AnomalyModule, data: AnomalyDataModule, category: str | None, method: str) -> list[str]:
    """The categories that the file is for. Raises UserError for an unknown one, and where one must be chosen."""
    names = model.categories
    if category is not None and category not in names:
        raise UserError(f"category={category}: this run's categories are {', '.join(names)}")
    if category is None and len(names) > 1 and reads_category(ScoringGraph(model, data), example(model, data)):
        raise UserError(
            f"category= is not set: {method}'s scores depend on the category; give one of {', '.join(names)}"
        )
    return names if category is None else [category]


def metadata(
    model: AnomalyModule, data: AnomalyDataModule, thresholds: dict[str, Any], method: str, quantile: float
) -> dict[str, Any]:
    """What the file says of itself: thresholds, categories, method, protocol and version."""
    step: Resize | None = next((step for _, step in data.eval_pipeline.steps), None)
    pipeline, size = data.eval_pipeline, model.map_size
    return {
        "thresholds": thresholds,
        "categories": list(thresholds),
        "method": method,
        "protocol": {
            "image_size": "original" if step is None else list(step.size),
            "resample": None if step is None else step.resample,
            "normalize": {"mean": pipeline.mean.flatten().tolist(), "std": pipeline.std.flatten().tolist()},
            "map_size": size if isinstance(size, str) else list(size),
            "scoring": {key: model.scoring[key] for key in ("pixel_smooth", "image_smooth", "image_score")},
            "quantile": quantile,
        },
        "version": __version__,
    }


def normal_samples(
    cfg: dict[str, Any], stored: dict[str, Any], checkpoint: Path, categories: list[str], precision: str
) -> tuple[list[Sample], AnomalyDataModule]:
    """Some normal training images of each category, and the run's data. Raises UserError where the data are gone."""
    try:
        data = build.make_data(cfg, stored)
        check_fingerprint(cfg, data, stored, checkpoint)
    except UserError as error:
        raise UserError(
            f"precision={precision}: it is checked on the run's normal training images, which can't be read ({error}); "
            "give precision=float32"
        ) from error
    count = max(1, NORMAL_IMAGES // len(categories))
    normal = [sample for sample in data.train_samples if not sample.label]
    each = [[sample for sample in normal if sample.category == name] for name in categories]
    return [sample for samples in each for sample in spread(samples, count)], data


def example(model: AnomalyModule, data: AnomalyDataModule) -> torch.Tensor:
    """Two images to trace the graph with, of a size that no dimension of the model shares where it may vary."""
    height, width = model.image_size
    extra = (0, 64) if data.test_size == "original" else (5, 11)
    return torch.zeros(2, height + extra[0], width + extra[1], 3, dtype=torch.uint8)


def noise(size: Sequence[int]) -> list[np.ndarray]:
    """Two images of noise, larger and smaller than `size`: for a run whose data are no longer there."""
    rng, (height, width) = np.random.default_rng(0), size
    sizes = (height + height // 4, width + width // 2), (height, max(1, width - width // 4))
    return [rng.integers(0, 256, (*each, 3), np.uint8) for each in sizes]


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most so many of the samples, evenly over the list."""
    return [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int))]


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found − expected| / |expected|."""
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1e-12)).max())


def room(run: Path, thresholds: dict[str, dict[str, float]]) -> float:
    """How far scores may move: TOLERANCE of the way from the median normal score to the threshold, of all categories
    the least. Both come from the run's normal images.
    """
    normal = read_normal(run)
    ways = [
        limits["image"] - np.median(normal["scores"][normal["categories"] == name])
        for name, limits in thresholds.items()
    ]
    return TOLERANCE * float(min(ways))


def check_moved(found: np.ndarray, expected: np.ndarray, allowed: float, precision: str, force: bool) -> str:
    """The line on how far normal images' scores have moved. Raises UserError if it is too far, unless `force`."""
    moved = float(np.abs(found - expected).max())
    line = (
        f"the scores of {len(found)} normal training images move by at most {moved:.3g}, which is "
        f"{100 * largest_difference(found, expected):.3g} % ({allowed:.3g} is allowed)"
    )
    if not moved <= allowed and not force:  # NaN is refused too
        raise UserError(f"precision={precision}: {line}; give precision=float32, or force=true to write the file")
    return line


def auroc_line(
    run: Path, data: AnomalyDataModule, categories: Sequence[str], scorer: files.Scorer, load: Callable[[Path], Any]
) -> str:
    """Image AUROC of the run's test images, mean over categories, by its own scores and by the file's."""
    before, after, count, stored = [], [], 0, read_scores(run)
    for name in categories:
        samples = [sample for sample in data.test_samples if sample.category == name]
        labels = np.array([sample.label for sample in samples])
        if len(set(labels.tolist())) < 2:
            continue
        scores = files.scores_of(scorer, (load(sample.path) for sample in samples))
        count += len(samples)
        before.append(image_metrics(stored[name].scores, stored[name].labels)["image_auroc"])
        after.append(image_metrics(scores, labels)["image_auroc"])
    if not count:
        return "image AUROC: no good and defective test images to measure it on"
    means = [float(np.mean(values)) for values in (before, after)]  # type: ignore[arg-type]
    return f"image AUROC on {count} test images: {means[0]:.4f} before, {means[1]:.4f} after"
