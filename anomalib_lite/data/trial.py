"""A few images pass through all transforms before a run starts: a mistake in a transform costs no training."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.data.pipeline import Pipeline, parts, transform_error
from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError

TRIES = 3  # of transforms that draw random numbers
DRAWS = 8  # of a transform that may draw random numbers


def try_out(data: Any, sizes: Mapping[Path, tuple[int, int]]) -> None:
    """Prepare images of the extreme sizes as in training and test.

    Args:
        data: the DataModule. sizes: (height, width) of its images.

    Raises:
        UserError: a transform fails, leaves something else than a uint8 image, or another size than the method expects;
            or `data.corrupt` does.
    """
    if data.transform is None and data.corrupt is None and data.train_pipeline is data.eval_pipeline:
        return  # nothing of the user's can fail: a run whose features are stored decodes no image
    train = _extremes(data.train_samples, sizes)
    if data.transform is not None and train:
        _refuse_random(data.eval_pipeline, sizes[train[0].path])
    for sample in train + _extremes(data.test_samples, sizes):
        expected = None if data.test_size == "original" else data.test_size
        _check_size(data, "test", sample, _apply(data.eval_pipeline, sample), expected)
    for sample in train:
        prepared = _apply(data.train_pipeline, sample)
        _check_size(data, "training", sample, prepared, data.image_size)
        if data.corrupt is not None:
            _check_corruption(data.corrupt, prepared[0])


def _extremes(samples: Sequence[Sample], sizes: Mapping[Path, tuple[int, int]]) -> list[Sample]:
    """The first sample, and those of the smallest height, the smallest width and the largest area."""
    if not samples:
        return []
    orders = (lambda h, w: h, lambda h, w: w, lambda h, w: -h * w)
    chosen = [samples[0], *(min(samples, key=lambda s: order(*sizes[s.path])) for order in orders)]
    return list({sizes[sample.path]: sample for sample in reversed(chosen)}.values())


def _refuse_random(pipeline: Pipeline, size: tuple[int, int]) -> None:
    """Raise UserError for a transform of all images that draws random numbers: a test image, its mask and its stored
    features would be different draws.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for key, step in pipeline.steps:
        results = []
        is_random = any(0 < part.p < 1 for part in parts([step]))
        for seed in range(0 if is_random else DRAWS):
            step.set_random_state(np.random.default_rng(seed), random.Random(seed))
            try:
                results.append(step(image=noise, mask=np.zeros(noise.shape[:2], np.uint8))["image"])
            except Exception:  # `_apply` reports it
                return
        if is_random or any(not np.array_equal(results[0], other) for other in results[1:]):
            raise UserError(f"{key}: {type(step).__name__} draws random numbers; move it to data.augment")
        noise = results[0]


def _apply(pipeline: Pipeline, sample: Sample) -> tuple[np.ndarray, str]:
    """The prepared image uint8 [h, w, 3], and "KEY: NAME" of the last transform that changed its size.

    Every transform is applied, whatever its probability.
    """
    steps = parts([step for _, step in pipeline.steps])
    probabilities = [each.p for each in steps]
    try:
        for each in steps:
            each.p = float(each.p > 0)
        for seed in range(TRIES if len(pipeline.steps) > 1 else 1):
            image = pipeline.load(sample.path)
            mask, resized = np.zeros(image.shape[:2], np.uint8), "data.transform"
            for number, (key, step) in enumerate(pipeline.steps):
                step.set_random_state(np.random.default_rng([seed, number]), random.Random(seed))
                before = image.shape
                try:
                    done = step(image=image, mask=mask)
                except UserError:
                    raise
                except Exception as error:
                    raise transform_error(key, step, error) from None
                image, mask = done["image"], done["mask"]
                if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (*mask.shape, 3):
                    kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
                    raise UserError(
                        f"{key}: {type(step).__name__} leaves {kind} and a mask {tuple(mask.shape)}; transforms must "
                        "leave a uint8 image [H, W, 3] and its mask [H, W] (normalisation is data.normalize)"
                    )
                resized = resized if image.shape == before else f"{key}: {type(step).__name__}"
    finally:
        for each, p in zip(steps, probabilities, strict=True):
            each.p = p
    return image, resized


def _check_size(
    data: Any, what: str, sample: Sample, prepared: tuple[np.ndarray, str], expected: tuple[int, int] | None
) -> None:
    image, resized = prepared
    size = image.shape[:2]
    if expected is None or size == expected:
        return
    found, wanted = ("×".join(map(str, each)) for each in (size, expected))
    option = size[0] if size[0] == size[1] else f"[{size[0]},{size[1]}]"
    advice = f"give data.image_size={option}"
    if resized == "data.transform":
        advice = "add a Resize to it"
    elif resized.startswith("data.augment"):
        advice = "for training on crops give data.treatment=texture instead"
    raise UserError(
        f"{resized} leaves {what} images of {found} pixels, but data.image_size is {wanted}; {advice} "
        f"(first: {sample.path})"
    )


def _check_corruption(corrupt: Any, image: np.ndarray) -> None:
    name = getattr(corrupt, "__name__", None) or getattr(getattr(corrupt, "func", None), "__name__", str(corrupt))
    try:
        changed, mask = corrupt(image, np.random.default_rng(0))
        right = changed.dtype == np.uint8 and changed.shape == image.shape
        right = right and mask.dtype == bool and mask.shape == image.shape[:2]
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.corrupt: {name} can't be applied ({why}); change its options") from None
    if not right:
        raise UserError(f"data.corrupt: {name} must give a uint8 image and a bool mask of the image's size")
