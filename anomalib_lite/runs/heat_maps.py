"""The colours of heat maps, and which images are worth a look: one rule for figures, W&B and comparisons.

Imports nothing heavy.
"""

import base64
import io
from typing import Any

import cv2
import numpy as np

GREEN = (0, 220, 0)
ROWS = 512  # of an image that are blended together: as floating-point numbers a large image takes much memory


def disagreement(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How far each image's rank contradicts its label: [N] in 0..1, 1 for the lowest defect and the highest good image.

    The worst cases are those with the highest value. Tied scores share their mean rank.
    """
    ordered = np.sort(scores)
    rank = (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right") - 1) / 2
    rank = rank / max(len(scores) - 1, 1)
    return np.where(labels == 1, 1 - rank, rank)


def chosen_cases(rows: list[int], outputs: dict[str, np.ndarray], count: int = 3) -> list[tuple[str, int]]:
    """A category's images to look at, by their indices, each with what it is an example of."""
    labels, scores = outputs["labels"][rows], outputs["scores"][rows]
    worst_first = [rows[i] for i in np.argsort(-disagreement(labels, scores), kind="stable")]
    bad = [i for i in worst_first if outputs["labels"][i]]
    good = [i for i in worst_first if not outputs["labels"][i]]
    missed = bad[: min(count, len(bad) // 2)]
    return (
        [("clear defect", i) for i in bad[len(missed) :][::-1][:count]]
        + [("weakest defect", i) for i in missed]
        + [("highest good", i) for i in good[:count]]
    )


def colours(amap: np.ndarray, threshold: dict[str, float]) -> np.ndarray:
    """A map [H, W] as RGB [H, W, 3]: dark at the background of normal images, the threshold half way up."""
    return cv2.applyColorMap((255 * _level(amap, threshold)).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An RGB image [H, W, 3] with the defects of its mask [h, w] outlined. The line lies around a defect, however small
    it is, and not on it.
    """
    height, width = image.shape[:2]
    inside = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0
    around = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8))
    outlines, _ = cv2.findContours(around, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), outlines, -1, GREEN, 2)


def overlay(image: np.ndarray, amap: np.ndarray, threshold: dict[str, float]) -> np.ndarray:
    """An RGB image [H, W, 3] under its map [H, W]."""
    done = np.empty_like(image)
    for top in range(0, len(image), ROWS):
        rows = slice(top, top + ROWS)
        opacity = (0.2 + 0.6 * _level(amap[rows], threshold))[..., None]
        done[rows] = (image[rows] * (1 - opacity) + colours(amap[rows], threshold) * opacity).astype(np.uint8)
    return done


def data_uri(picture: Any, kind: str, **options: Any) -> str:
    """A Pillow image as text that a page holds in place of a file; `kind` and `options` are those of `Image.save`."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _level(amap: np.ndarray, threshold: dict[str, float]) -> np.ndarray:
    low, half = threshold["background"], threshold["pixel"] - threshold["background"]
    return np.clip((amap - low) / max(2 * half, 1e-12), 0, 1)
