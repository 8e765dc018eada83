"""New images through a trained run: scores, heat maps and overlays."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from anomalib_lite.console import ProgressBar
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import load_rgb
from anomalib_lite.data.value_range import depth_notes, range_notes
from anomalib_lite.errors import ImageSizeError, UserError, explained_memory
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.paths import file_name, readable
from anomalib_lite.runs.folder import HEATMAPS, OVERLAYS
from anomalib_lite.runs.heat_maps import colours, overlay
from anomalib_lite.runs.load import check_finite
from anomalib_lite.runs.prediction_report import Report
from anomalib_lite.runs.prediction_table import Prediction


class Predictor:
    """Scores files with a trained run, and draws them.

    Args:
        model, data: the run's.
        limits: the thresholds as `artifacts.thresholds_of` gives them.
        output, base: the folder for the pictures, and the one that all inputs share.
        batch_size, workers: of the loader.
        most, about: of the report, see `Report`.
    """

    def __init__(
        self,
        model: AnomalyModule,
        data: AnomalyDataModule,
        limits: dict[str, Any],
        output: Path,
        base: Path,
        batch_size: int,
        workers: int,
        most: int,
        about: dict[str, str],
    ):
        self.model, self.data, self.limits = model, data, limits
        self.output, self.base, self.batch_size, self.workers = output, base, batch_size, workers
        self.report = Report(most, about, self.pictures)
        self.headers: dict[str, Any] = {}  # of the images that were read, by path

    def scored(self, files: Sequence[Path], quiet: bool = False) -> Iterator[tuple[Path, Prediction] | str]:
        """Every image with its prediction, once its pictures are drawn; or the message that says why it has none, which
        begins with its path.

        Args:
            quiet: show no progress, and start no worker for a few files.
        """
        category = self.model.categories.index(self.limits["category"])
        workers = 0 if quiet and len(files) <= self.batch_size else self.workers
        with ProgressBar("images", len(files), quiet=quiet) as bar:
            for batch in self.data.new_dataloader(files, category, self.batch_size, workers):
                yield from batch["damaged"]
                found: Iterable[tuple[str, Any, float]] = ()
                try:
                    if batch["path"]:
                        found = self._maps(batch)
                        self.headers |= zip(batch["path"], batch["headers"], strict=True)
                except ImageSizeError as error:  # images of their own sizes come one by one
                    yield from [f"{path}: {error}" for path in batch["path"]]
                for path, amap, score in found:
                    try:
                        yield Path(path), self._predicted(Path(path), score, amap)
                    except UserError as error:  # it was readable before: a watched file has changed
                        yield str(error) if str(error).startswith(path) else f"{path}: {error}"
                bar.step(count=len(batch["path"]) + len(batch["damaged"]))

    def remarks(self) -> tuple[list[str], list[str]]:
        """What was left out of the files that were read since the last call, and notes on their kind of pixels."""
        headers, self.headers = self.headers, {}
        pages = [
            f"{path}: images 2 to {header.pages} of this file; save each as a file"
            for path, header in headers.items()
            if header.pages > 1
        ]
        notes = depth_notes(self.data.pixels, [(path, header.depth) for path, header in headers.items()])
        deep = [Path(path) for path, header in headers.items() if header.depth != "8-bit"]
        with contextlib.suppress(UserError):  # of a watched file that has changed
            notes += range_notes(self.data.pixels, deep)
        return pages, notes

    def pictures(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """An image that was scored earlier and its overlay, uint8 [H, W, 3]. Raises UserError if one is gone."""
        path = self.base / file_name(name)
        return self.data.eval_pipeline.shown(path), load_rgb(self._file(OVERLAYS, path))

    def _maps(self, batch: Any) -> Iterator[tuple[str, Any, float]]:
        message = f"batch_size={self.batch_size} is too large for this device; give a smaller one, or device=cpu"
        with torch.inference_mode(), explained_memory(lambda: message):
            found = self.model.predict_step(move_data_to_device(batch, self.model.device), 0)
        return zip(batch["path"], found["map"], found["score"].tolist(), strict=True)

    def _predicted(self, path: Path, score: float, found: torch.Tensor) -> Prediction:
        """The prediction of a score and an anomaly map [H, W], with the pictures at the image's size."""
        check_finite(str(path), score, found)
        prediction = Prediction(readable(path.relative_to(self.base).as_posix()), score, self.limits["image"])
        image = self.data.eval_pipeline.shown(path)
        amap = cv2.resize(found.float().cpu().numpy(), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        covered = overlay(image, amap, self.limits)
        for folder, picture in ((HEATMAPS, colours(amap, self.limits)), (OVERLAYS, covered)):
            file = self._file(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
        self.report.add(prediction, (image, covered))
        return prediction

    def _file(self, folder: str, path: Path) -> Path:
        """Of a picture: at the image's place below the base, with its suffix."""
        return self.output / folder / f"{path.relative_to(self.base)}.png"
