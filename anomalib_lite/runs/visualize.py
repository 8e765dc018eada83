"""What a method shows of some images beside their maps, such as reconstructions: `AnomalyModule.visualize`."""

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import Sample
from anomalib_lite.methods.base import AnomalyModule

Rows = dict[str, np.ndarray]  # {title: uint8 [N, h, w, 3]}


def of_test_images(model: AnomalyModule, data: AnomalyDataModule, samples: list[Sample]) -> Rows:
    """At data.image_size, whatever the images' own sizes; none where the method shows nothing."""
    if type(model).visualize is AnomalyModule.visualize:
        return {}
    loader = data.new_dataloader([sample.path for sample in samples], 0, 1, 0)
    each = [_shown(model, batch) for batch in loader]
    return {title: np.stack([_resized(rows[title][0], data.image_size) for rows in each]) for title in each[0]}


def of_training_images(model: AnomalyModule, data: AnomalyDataModule, count: int = 8) -> Rows:
    """The first images of the first batch: clean, corrupted, the corruption's mask, and what the method shows."""
    if type(model).visualize is AnomalyModule.visualize or data.corrupt is None:
        return {}
    batch = {key: value[:count] for key, value in next(iter(data.loader_from(0))).items()}
    clean, corrupted = (data.train_pipeline.denormalise(batch[key]) for key in ("clean", "image"))
    rows = {"clean": clean, "corrupted": corrupted, "mask": batch["corruption_mask"][:, None].float()}
    return {title: _as_images(images) for title, images in rows.items()} | _shown(model, batch)


@torch.inference_mode()
def _shown(model: AnomalyModule, batch: dict[str, Any]) -> Rows:
    batch = model.eval().transfer_batch_to_device(batch, model.device, 0)
    return {title: _as_images(images) for title, images in model.visualize(batch).items()}


def _as_images(images: Tensor) -> np.ndarray:
    """[B, 1 or 3, H, W] in [0, 1] -> uint8 [B, H, W, 3]."""
    images = images.float().clamp(0, 1).mul(255).round().byte().expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
