"""Figures of a run: heat maps of its clearest, weakest and false cases per category, and what the method shows itself.

Other rooms use the colours of maps (`colours`, `overlay`) and the choice of images (`chosen_cases`).
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import Sample
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.tiles import tiled
from anomalib_lite.runs.decisions import score_text
from anomalib_lite.runs.folder import TRAINING_FIGURE
from anomalib_lite.runs.heat_maps import chosen_cases, outlined, overlay

Rows = dict[str, np.ndarray]  # {title: uint8 [N, h, w, 3]}
TILE, GAP = 192, 6  # pixels: the side of an image in a figure, and the space between two
BLACK, RED = (0, 0, 0), (200, 0, 0)


def write_figures(
    folder: Path,
    data: AnomalyDataModule,
    outputs: dict[str, Any],
    thresholds: dict[str, dict[str, float]],
    title: str,
    model: AnomalyModule,
) -> None:
    """`<category>.png`: the defects with the lowest scores, the good images with the highest, and the clearest defects.

    Heat maps share one colour scale per category: normal images' background is dark, the pixels' threshold half way up.
    Between images and heat maps are the rows of `AnomalyModule.visualize`, such as reconstructions.

    Args:
        outputs: of the test set, with the columns of `metrics.per_category`. thresholds: per category.
    """
    for category in data.categories:
        rows = [i for i, sample in enumerate(data.test_samples) if sample.category == category]
        if rows:
            cases = chosen_cases(rows, outputs)
            shown = visualized(model, data, [data.test_samples[i] for _, i in cases])
            sheet = contact_sheet(data, cases, outputs, thresholds[category], f"{title}: {category}", shown)
            _save(figure_file(folder, category), sheet)


def figure_file(folder: Path, category: str) -> Path:
    """The file of a category's figure: that of line1/bottle is in a folder line1, and no name leads out of `folder`."""
    leads_out = category.startswith("/") or ".." in category.split("/")
    return folder / f"{category.replace('/', '_') if leads_out else category}.png"


def contact_sheet(
    data: AnomalyDataModule,
    cases: list[tuple[str, int]],
    outputs: dict[str, Any],
    threshold: dict[str, float],
    title: str,
    shown: Rows,
) -> np.ndarray:
    """One column per case: the image with its defect outlined, the rows `shown`, and its heat map; scores as multiples
    of the threshold, red above it.
    """
    head, samples = 30, data.test_samples
    height = head + (2 + len(shown)) * (TILE + GAP) + 40
    sheet = np.full((height, len(cases) * (TILE + GAP) + GAP, 3), 255, np.uint8)
    _write(sheet, title, GAP, 20, 0.5)
    for column, (kind, i) in enumerate(cases):
        x = GAP + column * (TILE + GAP)
        image = _tile(data.eval_pipeline.shown(samples[i].path))
        amap = cv2.resize(outputs["maps"][i], (TILE, TILE), interpolation=cv2.INTER_LINEAR)
        rows = (_tile(row[column]) for row in shown.values())
        tiles = [outlined(image, outputs["masks"][i]), *rows, overlay(image, amap, threshold)]
        for number, tile in enumerate(tiles):
            y = head + number * (TILE + GAP)
            sheet[y : y + TILE, x : x + TILE] = tile
        score, limit = float(outputs["scores"][i]), threshold["image"]
        y = head + len(tiles) * (TILE + GAP) + 10
        _write(sheet, kind if samples[i].defect == "good" else f"{kind}: {samples[i].defect}", x, y, 0.4)
        _write(sheet, score_text(score, limit), x, y + 18, 0.4, RED if score > limit else BLACK)
    return sheet


def visualized(model: AnomalyModule, data: AnomalyDataModule, samples: list[Sample]) -> Rows:
    """What the method shows of test images, at data.image_size whatever the images' sizes; empty where it has none."""
    if type(model).visualize is AnomalyModule.visualize:
        return {}
    batches = data.new_dataloader([sample.path for sample in samples], data.categories.index(samples[0].category), 1, 0)
    each = [_visualized(model, batch, data.image_size) for batch in batches]
    return {title: np.concatenate([rows[title] for rows in each]) for title in each[0]}


def training_figure(folder: Path, data: AnomalyDataModule, model: AnomalyModule, count: int = 8) -> None:
    """`training.png` of a method that has `visualize`, where training images are corrupted: the first images of the
    first batch clean and corrupted, the corruption's mask, and what the method shows of them. One column per image.
    """
    if type(model).visualize is AnomalyModule.visualize or data.corrupt is None:
        return
    batch = {key: value[:count] for key, value in next(iter(data.train_dataloader(first_batch=0))).items()}
    clean, corrupted = (data.train_pipeline.denormalise(batch[key]) for key in ("clean", "image"))
    images = {"clean": clean, "corrupted": corrupted, "mask": batch["corruption_mask"][:, None].float()}
    rows = {title: _as_images(images) for title, images in images.items()} | _visualized(model, batch, data.image_size)
    side = 110
    width = side + max(map(len, rows.values())) * (TILE + GAP)
    sheet = np.full((len(rows) * (TILE + GAP) + GAP, width, 3), 255, np.uint8)
    for number, (title, row) in enumerate(rows.items()):
        y = GAP + number * (TILE + GAP)
        _write(sheet, title, GAP, y + TILE // 2, 0.45)
        for column, image in enumerate(row):
            x = side + column * (TILE + GAP)
            sheet[y : y + TILE, x : x + TILE] = _tile(image)
    _save(folder / TRAINING_FIGURE, sheet)


@torch.inference_mode()
def _visualized(model: AnomalyModule, batch: dict[str, Any], size: tuple[int, int]) -> Rows:
    batch = model.eval().transfer_batch_to_device(batch, model.device, 0)
    shown = tiled(model.visualize, batch, model.tiling) if model.tiling else model.visualize(batch)
    return {title: _as_images(F.interpolate(images, size, mode="area")) for title, images in shown.items()}


def _as_images(images: Tensor) -> np.ndarray:
    """[B, 1 or 3, H, W] in [0, 1] -> uint8 [B, H, W, 3]."""
    images = images.float().clamp(0, 1).mul_(255).round_().byte().expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _tile(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)


def _write(sheet: np.ndarray, text: str, x: int, y: int, size: float, colour: tuple[int, ...] = BLACK) -> None:
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def _save(file: Path, sheet: np.ndarray) -> None:
    """Write a figure, with its folder. Raises OSError where that is not possible, which cv2.imwrite would not do."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
