"""Heat maps of a run's worst and best cases, a picture a category; and what a method shows of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from anomalib_lite.data.samples import Sample, load_rgb
from anomalib_lite.runs.heat_maps import chosen_cases, overlay


def write_figures(
    folder: Path,
    samples: list[Sample],
    categories: list[str],
    arrays: dict[str, np.ndarray],
    thresholds: dict[str, Any],
    title: str,
    pictures: Callable[[list[Sample]], dict[str, np.ndarray]] = lambda samples: {},
) -> None:
    """`<category>.png`: the defects with the lowest scores, the good images with the highest, and the clearest defects.

    Heat maps share one colour scale per category: normal images' background is dark, the pixels' threshold half way up.
    `pictures` gives rows between images and heat maps, such as reconstructions: {title: uint8 [N, h, w, 3]}.
    """
    folder.mkdir(exist_ok=True)
    for category in categories:
        rows = [i for i, sample in enumerate(samples) if sample.category == category]
        if rows:
            threshold = thresholds["per_category"][category]
            cases = chosen_cases(rows, arrays)
            between = pictures([samples[i] for _, i in cases])
            picture = contact_sheet(samples, cases, arrays, threshold, f"{title}: {category}", between)
            cv2.imwrite(str(folder / f"{category}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def write_rows(file: Path, rows: dict[str, np.ndarray], tile: int = 192) -> None:
    """Rows of pictures uint8 [N, h, w, 3] with their titles, a column an image."""
    gap, side = 6, 110
    count = max(len(row) for row in rows.values())
    sheet = np.full((len(rows) * (tile + gap) + gap, side + count * (tile + gap), 3), 255, np.uint8)
    for number, (title, row) in enumerate(rows.items()):
        y = gap + number * (tile + gap)
        _write(sheet, title, gap, y + tile // 2, 0.45)
        for column, picture in enumerate(row):
            x = side + column * (tile + gap)
            sheet[y : y + tile, x : x + tile] = _tile(picture, tile)
    file.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(file), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def _tile(picture: np.ndarray, tile: int) -> np.ndarray:
    return cv2.resize(picture, (tile, tile), interpolation=cv2.INTER_AREA)


def contact_sheet(
    samples: list[Sample],
    cases: list[tuple[str, int]],
    arrays: dict[str, np.ndarray],
    threshold: dict[str, float],
    title: str,
    between: dict[str, np.ndarray],
    tile: int = 192,
) -> np.ndarray:
    """A column a case: the image with its defect outlined, what is `between`, and its heat map; scores as multiples of
    the threshold.
    """
    gap, head = 6, 30
    sheet = np.full((head + (2 + len(between)) * (tile + gap) + 40, len(cases) * (tile + gap) + gap, 3), 255, np.uint8)
    _write(sheet, title, gap, 20, 0.5)
    for column, (kind, i) in enumerate(cases):
        x = gap + column * (tile + gap)
        image = _tile(load_rgb(samples[i].path), tile)
        amap = cv2.resize(arrays["maps"][i], (tile, tile), interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(arrays["masks"][i].astype(np.uint8), (tile, tile), interpolation=cv2.INTER_NEAREST)
        outlined = image.copy()
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(outlined, outlines, -1, (0, 220, 0), 1)
        sheet[head : head + tile, x : x + tile] = outlined
        tiles = [*(_tile(row[column], tile) for row in between.values()), overlay(image, amap, threshold)]
        for number, picture in enumerate(tiles, start=1):
            y = head + number * (tile + gap)
            sheet[y : y + tile, x : x + tile] = picture
        ratio = float(arrays["scores"][i]) / threshold["image"] if threshold["image"] else float("nan")
        y = head + (1 + len(tiles)) * (tile + gap) + 10
        _write(sheet, kind if samples[i].defect == "good" else f"{kind}: {samples[i].defect}", x, y, 0.4)
        _write(sheet, f"{ratio:.2f} x threshold", x, y + 18, 0.4, (0, 0, 0) if ratio < 1 else (200, 0, 0))
    return sheet


def _write(sheet: np.ndarray, text: str, x: int, y: int, size: float, colour: tuple[int, ...] = (0, 0, 0)) -> None:
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)
