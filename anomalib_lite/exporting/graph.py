"""A trained method from 8-bit images to scores and maps as one graph of PyTorch's operations."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.transforms import Resize
from anomalib_lite.errors import UserError
from anomalib_lite.exporting.resize import resized
from anomalib_lite.methods.base import AnomalyModule

LARGE = 1024  # numbers: smaller weights stay in float32


class ScoringGraph(nn.Module):
    """Images uint8 [B, H, W, 3] (RGB) of one size -> scores [B] and smoothed maps [B, h, w], those of `predict_step`.

    Args:
        category: index of the category that the images belong to; None: the method sees no category.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: AnomalyModule, data: AnomalyDataModule, category: int | None = None):
        super().__init__()
        pipeline = data.eval_pipeline
        self.model, self.category = model, category
        self.resize: Resize | None = next((step for _, step in pipeline.steps), None)
        for name, values in (("mean", pipeline.mean), ("std", pipeline.std)):
            self.register_buffer(name, values)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        count, height, width = images.shape[:3]
        if self.resize is not None:
            images = resized(images, self.resize.size, self.resize.resample)
        pixels = images.permute(0, 3, 1, 2).float() / 255
        batch: dict[str, Any] = {"image": (pixels - self.mean) / self.std}
        if self.category is not None:
            batch["category"] = torch.full((count,), self.category)
        if self.model.map_size == "original":
            batch["map_size"] = height, width
        scored = self.model.score(batch)
        return scored["score"], scored["map"]


class HalfWeights(nn.Module):
    """A module whose large weights are stored in float16. It computes in float32: weights are converted when used."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.inner = (module,)  # not registered: its float32 weights would be stored too
        self.names = {}
        for number, (name, value) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            half = value.dtype == torch.float32 and value.numel() >= LARGE
            self.names[name] = f"weight{number}"
            self.register_buffer(f"weight{number}", value.detach().half() if half else value.detach())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        stored = {name: getattr(self, own) for name, own in self.names.items()}
        used = {name: x.float() if x.dtype == torch.float16 else x for name, x in stored.items()}
        return torch.func.functional_call(self.inner[0], used, (images,))


def reads_category(graph: ScoringGraph, images: Tensor) -> bool:
    """Whether the method of a graph without a category reads the category of the images."""
    try:
        with torch.no_grad():
            graph(images)
    except Exception as error:  # `traced` reports every other error
        return isinstance(error, KeyError) and error.args == ("category",)
    return False


def check_exportable(cfg: dict[str, Any], stored: dict[str, Any], data: AnomalyDataModule) -> None:
    """Raise UserError for a run whose preparation of images no file can hold.

    Args:
        cfg: the run's configuration. stored: what `read_checkpoint` gives. data: without its images.
    """
    if not stored.get("finished", True):
        raise UserError("run: its training has not ended; continue it with resume=true, then export it")
    if data.pixels.depth not in (None, "8-bit"):
        raise UserError(
            f"data.value_range={list(data.pixels.value_range or ())}: the run's images have more than 8 bits per "
            "channel, and an exported file takes 8; convert the images to 8 bits and train with them"
        )
    steps = [step for _, step in data.eval_pipeline.steps]
    if not data.eval_pipeline.only_resizes or len(steps) > 1:
        names = ", ".join(type(step).__name__ for step in steps)
        raise UserError(
            f"data.transform: a file can hold one resizing and not {names}; train with data.image_size and "
            "data.resample alone"
        )
    if cfg["data"].get("tiling"):
        raise UserError("data.tiling: a file can't cut images into tiles; train without tiling, or use predict")


def traced(graph: nn.Module, example: Tensor, what: str, own_sizes: bool = False) -> ExportedProgram:
    """The graph as an exported program that takes any number of images of any size.

    Args:
        example: images uint8 [2, H, W, 3] that it is traced with. what: the method, for the error.
        own_sizes: whether the network sees images at their own sizes; it may then need images that are large enough.

    Raises:
        UserError: the method does something that torch.export can't follow.
    """
    height, width = (Dim.DYNAMIC, Dim.DYNAMIC) if own_sizes else (Dim("height", min=1), Dim("width", min=1))
    sizes = {0: Dim("images", min=1), 1: height, 2: width}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes=(sizes,))
    except Exception as error:  # torch.export raises exceptions of many classes
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"run: method={what} can't be exported ({line}); use predict, or load_run in Python") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporters log and warn about, which is no user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
