"""Where a run's frozen features lie: computed and stored before training, in a table on the GPU if they fit."""

from typing import Any

import lightning as L
import torch

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError, explained_memory
from anomalib_lite.features.precompute import images_per_pass, precompute, row_bytes, unchanged_images
from anomalib_lite.methods.base import AnomalyModule

RECOMPUTED = "on a GPU, a method that needs the images computes features faster than it copies them from the host"


def with_features(
    cfg: dict[str, Any], trainer: L.Trainer, data: AnomalyDataModule, model: AnomalyModule, fit: bool
) -> tuple[AnomalyDataModule, dict[str, Any]]:
    """The data for the method on its device, with the frozen backbone's features, and result.json's `cache`.

    Every rank must call this function, after the process group has been joined. Raises UserError if the memory of the
    device does not suffice.
    """
    device, backbone = trainer.strategy.root_device, model.backbone
    uses_images = model.uses_images or not model.frozen_features
    data = data.with_features(None, uses_images, device)
    if not fit:
        data.kept_images = None  # every image is seen once
    if not model.frozen_features or backbone is None:
        return data, {"used": False}
    if data.tiling or data.test_size == "original":
        return data, {"used": False, "why": "features of tiles, and of images of their own sizes, are not stored"}
    with explained_memory(
        lambda: (
            f"the backbone sees {images_per_pass(backbone)} images at once when features are stored; give a smaller "
            "data.image_size, or cache.enabled=false hardware.feature_memory_gb=0"
        )
    ):
        backbone.to(device)
        gigabytes = cfg["hardware"].get("feature_gpu_gb", "auto")
        limit = table_limit(gigabytes, device) if model.total_steps else 0  # a closed form reads a row twice at most
        if uses_images and device.type != "cpu":
            fits = fit and limit > 0 and fits_table(data, model, limit)
            if not trainer.strategy.reduce_boolean_decision(fits):
                return data, {"used": False, "why": RECOMPUTED}
        cache = cfg.get("cache") or {"enabled": False}  # a stored run of an earlier version has none
        how = (cache, cfg["hardware"]["feature_memory_gb"], fit, model.stored_levels, model.keeps)
        stored, report = precompute(trainer, data, backbone, *how, of_test=not uses_images or device.type == "cpu")
    data = data.with_features(stored, uses_images, device)
    train = [str(sample.path) for sample in data.train_samples]
    try:
        with explained_memory(
            lambda: "the features' table does not fit on this device; give a smaller hardware.feature_gpu_gb"
        ):
            if fit and limit and stored.to_device(train, device, limit):
                report["gpu_gb"] = round(len(train) * stored.row(train[0]).nbytes / 2**30, 3)
    except UserError:
        if gigabytes != "auto":
            raise
    return data, report


def table_limit(gigabytes: float | str, device: torch.device) -> float:
    """Bytes that the table of features may take on this device; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] / 2 if gigabytes == "auto" else float(gigabytes) * 2**30


def fits_table(data: AnomalyDataModule, model: AnomalyModule, limit: float) -> bool:
    """Whether the training images have features that fit into so many bytes."""
    train, size = unchanged_images(data), data.test_size
    if not train or isinstance(size, str) or model.backbone is None:
        return False
    return len(train) * row_bytes(model.backbone, model.stored_levels, size) <= limit
