"""A trained run in Python: load it once, score arrays of images that no file holds."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.dataset import Batch
from anomalib_lite.data.image_files import to_uint8
from anomalib_lite.errors import UserError, explained_memory
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import build, own_modules
from anomalib_lite.runs.artifacts import thresholds_of
from anomalib_lite.runs.checkpoints import read_checkpoint
from anomalib_lite.runs.devices import allow_tf32, check_gpu, most_threads, set_threads
from anomalib_lite.runs.folder import read_run, stored_digests

log = logging.getLogger(__name__)


def check_finite(name: str, score: float, amap: torch.Tensor) -> None:
    """Raise UserError if the score of the image `name` or a value of its map is NaN or infinite."""
    if not (np.isfinite(score) and torch.isfinite(amap).all()):
        raise UserError(f"{name}: its anomaly map or score is not finite; check that the run was trained well")


class LoadedRun:
    """A trained method and the image preparation of its run.

    Attributes:
        model: the method in evaluation mode, on its device.
        thresholds: `image` and `pixel`, above which an image or a pixel counts as defective; `background`, the median
            of a normal map; `category`, the category that they hold for.
    """

    def __init__(self, model: AnomalyModule, data: AnomalyDataModule, thresholds: dict[str, Any]):
        self.model, self.thresholds, self._pipeline = model, thresholds, data.eval_pipeline

    def predict(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Scores float32 [N] and smoothed anomaly maps, N arrays float32 [h, w], of images uint8 [H_i, W_i, 3] (RGB).

        A run on images with more than 8 bits per channel takes arrays [H_i, W_i] or [H_i, W_i, 3] of other types too:
        the run's range of values is applied to them as in its test.
        Images are prepared as in the run's test and scored one by one, so that an image's score does not depend on the
        images beside it. Raises UserError for an array of another shape or type, and for a score or a map that is not
        finite.
        """
        scores, maps = np.zeros(len(images), np.float32), []
        for i, image in enumerate(images):
            scored = self._predict_one(image, i)
            scores[i] = float(scored["score"][0])
            check_finite(f"images[{i}]", scores[i], scored["map"][0])
            maps.append(scored["map"][0].float().cpu().numpy())
        return scores, maps

    def _predict_one(self, image: np.ndarray, index: int) -> dict[str, Any]:
        image = self._to_uint8(image)
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(f"images[{index}]: {kind} is no uint8 array [H, W, 3]; convert it to 8-bit RGB")
        try:
            tensor, mask = self._pipeline(image, np.zeros(image.shape[:2], bool), (0, 0, 0, 0))
        except UserError as error:  # smaller than a tile
            raise UserError(f"images[{index}]: {error}") from None
        device = self.model.device
        batch = Batch(
            image=tensor[None].to(device),
            mask=mask[None].to(device),
            label=torch.zeros(1, dtype=torch.int64, device=device),
            category=torch.tensor([self.model.categories.index(self.thresholds["category"])], device=device),
            size=torch.tensor([image.shape[:2]], device=device),
            index=torch.zeros(1, dtype=torch.int64, device=device),
            path=[f"images[{index}]"],
        )
        with torch.inference_mode():
            return self.model.predict_step(batch, 0)

    def _to_uint8(self, image: Any) -> Any:
        """A deep array as uint8 [H, W, 3] by the run's value range; anything else as it is."""
        limits = self._pipeline.value_range
        if (
            limits is None
            or not isinstance(image, np.ndarray)
            or image.dtype == np.uint8
            or image.dtype.kind not in "iuf"
        ):
            return image
        image = to_uint8(image, limits)
        return np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image


def load_run(
    run: str | Path,
    category: str | None = None,
    quantile: float | None = None,
    device: str = "auto",
    precision: str | int | None = None,
) -> LoadedRun:
    """The finished run in the folder `run`, ready to score images.

    Args:
        run: the run's folder. The file of a method of your own that is not found otherwise is read from the folder
            where it lay when the run was started; this folder becomes the last one of sys.path.
        category: the category whose thresholds hold; required for a model of several categories.
        quantile: another quantile of the normal training images' scores for the thresholds; None: the run's own.
        device: "auto", "cpu" or "gpu".
        precision: "auto", 32 or "bf16"; None: as in the run's configuration. With auto, a machine that computes in bf16
            gives scores that differ in their third or fourth digit from those of one that does not.

    Raises UserError if the folder holds no finished run, if the file of your own method is not found, or for an unknown
    category, quantile, device or precision.
    """
    checkpoint, cfg, _ = read_run(Path(run).expanduser())
    if precision not in (None, "auto", 32, "bf16"):
        raise UserError(f"precision={precision}: choose auto, 32 or bf16")
    cfg["hardware"]["precision"] = precision or cfg["hardware"]["precision"]
    thresholds = thresholds_of(Path(run).expanduser(), category, quantile)
    model, data = load(checkpoint, cfg, device)
    return LoadedRun(model, data, thresholds)


def load(checkpoint: Path, cfg: dict[str, Any], device: str) -> tuple[AnomalyModule, AnomalyDataModule]:
    """A run's method with its trained weights, in evaluation mode, and its DataModule without its data."""
    stored = read_checkpoint(checkpoint, cfg)
    for note in own_modules.change_notes(cfg, stored_digests(checkpoint.parents[1])):
        log.warning(note)
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("device=gpu: no GPU is visible here; choose device=cpu or device=auto")
    # no Trainer and no ranks: a caller may be a rank of its own training
    accelerator = "gpu" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if accelerator == "gpu":
        check_gpu(cfg["hardware"]["precision"], "precision", "device=cpu")
    set_threads(cfg["hardware"]["threads"], most_threads(accelerator, devices=1, slurm=False))
    allow_tf32(False)
    data = build.data_module(cfg, category=stored["categories"], pixels=build.stored_pixels(stored))
    model = build.make_method(cfg, build.make_backbone(cfg, stored=True), data, stored["categories"])
    build.load_weights(model, checkpoint)
    with explained_memory(lambda: "this GPU has no room for the model; give device=cpu"):
        model.eval().to("cuda" if accelerator == "gpu" else "cpu")
    model.lay_out(model.device)  # there is no trainer that calls `setup`
    return model, data
