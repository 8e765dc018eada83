"""Heat maps of the same images under every method, worst cases first, and curves: what a comparison shows of maps."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalib_lite.comparison.datasets import masks_of, root_of
from anomalib_lite.comparison.find_runs import Run, dict_at
from anomalib_lite.comparison.tables import Row, Table
from anomalib_lite.data.samples import load_mask, load_rgb
from anomalib_lite.errors import UserError
from anomalib_lite.metrics.curves import CURVES
from anomalib_lite.paths import file_name
from anomalib_lite.runs.decisions import score_text
from anomalib_lite.runs.heat_maps import colours, data_uri, disagreement, outlined

MOST_METHODS = 8  # in curves and heat maps: the best
TILE = 128  # pixels of an image's thumbnail
RESAMPLE = Image.Resampling.BILINEAR
COLOURS = 64  # of a heat map, for small files


@dataclass
class Case:
    """A test image with its thumbnail (a data URI, or empty), and under each method its heat map, its score relative to
    the threshold (empty where there is none), and whether the decision is wrong.
    """

    path: str
    label: int
    disagreement: float
    picture: str = ""
    maps: list[tuple[str, str, bool]] = field(default_factory=list)


def best_rows(table: Table, metric: str, most: int = MOST_METHODS) -> list[Row]:
    """The best rows by the mean of their categories, in the table's order."""

    def quality(row: Row) -> tuple[int, float]:
        means = table.means(row, metric)
        return len(means), float(np.mean(list(means.values()))) if means else 0.0

    best = sorted(table.rows, key=quality, reverse=True)[:most]
    return [row for row in table.rows if row in best]


def curves(run: Run, category: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The points x, y of each of CURVES that the run has, up to its limit."""
    keys = {name: (f"{category}/{curve.x}", f"{category}/{curve.y}") for name, curve in CURVES.items()}
    points = run.maps([key for pair in keys.values() for key in pair])
    found = {}
    for name, (x, y) in keys.items():
        if x in points and y in points and points[x].shape == points[y].shape and points[x].ndim == 1:
            found[name] = cut(points[x].astype(np.float64), points[y].astype(np.float64), CURVES[name].limit)
    return found


def cut(x: np.ndarray, y: np.ndarray, limit: float, most: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """The curve from 0 to `limit`, interpolated there, thinned to `most` points."""
    inside = x <= limit
    if not inside.all() and inside.any():
        end = np.interp(limit, x, y)
        x, y = np.append(x[inside], limit), np.append(y[inside], end)
    keep = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int)) if len(x) > most else np.arange(len(x))
    return x[keep], y[keep]


def worst_cases(category: str, rows: list[Row], most: int, budget: int) -> list[Case]:
    """The images whose ranks contradict their labels most, averaged over `rows`; about `budget` bytes at most."""
    runs = [run for row in rows if (run := row.first_run(category))]
    scored = [run.scores.get(category) for run in runs]
    paths = next((scores.paths for scores in scored if scores), ())
    same = [scores for scores in scored if scores and scores.paths == paths]
    if not same:
        return []
    rank = np.mean([disagreement(labels, scores) for _, labels, scores in same], axis=0)
    run_of = {root: run for run in reversed(runs) if (root := root_of(run))}
    masks = cache(lambda root: masks_of(run_of[root], root, category))
    cases = [
        Case(paths[i], int(same[0].labels[i]), float(rank[i]), thumbnail(run_of, paths[i], masks))
        for i in np.argsort(-rank, kind="stable")[:most]
    ]
    for run, scores in zip(runs, scored, strict=True):  # the maps of one run at a time are in memory
        limits = dict_at(run.result, "thresholds", "per_category", category)
        limits = {key: float(value) for key, value in limits.items() if isinstance(value, int | float)}
        score_of = dict(zip(scores.paths, scores.scores, strict=True)) if scores else {}
        map_of, scale = maps_by_path(run)
        for case in cases:
            score, limit = score_of.get(case.path), limits.get("image")
            amap = map_of.get(case.path)
            uri = "" if amap is None else heat_map(amap.astype(np.float64) * scale, limits)
            if score is None or limit is None:
                case.maps.append((uri, "", False))
            else:
                case.maps.append((uri, score_text(score, limit), (score > limit) != (case.label == 1)))
    while cases and sum(len(case.picture) + sum(len(uri) for uri, *_ in case.maps) for case in cases) > budget:
        cases.pop()
    return cases


def maps_by_path(run: Run) -> tuple[dict[str, np.ndarray], float]:
    """The run's maps [h, w] float16 by their images' paths, and the factor that restores their scale; empty where the
    file does not hold them.
    """
    stored = run.maps(["maps", "paths", "scale"])
    if len(stored) < 3 or stored["maps"].ndim != 3 or len(stored["maps"]) != len(stored["paths"]):
        return {}, 1.0
    return dict(zip(map(str, stored["paths"]), stored["maps"], strict=True)), float(stored["scale"])


def thumbnail(run_of: Mapping[Path, Run], path: str, masks: Callable[[Path], dict[str, Any]]) -> str:
    """The image with its defects outlined as a JPEG data URI; empty if the image is gone.

    Args:
        run_of: roots, each with a run that has its images below it.
        masks: gives the samples with masks below a root by the paths of their images.
    """
    for root, run in run_of.items():
        path = path if (root / path).is_file() else file_name(path)
        if ".." in Path(path).parts or not (root / path).is_file():
            continue
        with contextlib.suppress(Exception):  # a damaged image or mask does not stop the page
            image = load_rgb(root / path, dict_at(run.result, "data").get("value_range"))
            picture = np.array(Image.fromarray(image).resize((TILE, TILE), RESAMPLE, reducing_gap=2))
            if sample := masks(root).get(path):
                with contextlib.suppress(UserError):
                    picture = outlined(picture, load_mask(sample.mask, sample.dark_mask))
            return data_uri(Image.fromarray(picture), "JPEG", quality=85, subsampling=0)
    return ""


def heat_map(amap: np.ndarray, limits: dict[str, float]) -> str:
    """A map [h, w] as a PNG data URI in the colours of a run's figures, or from its minimum to its maximum."""
    amap = np.nan_to_num(amap)
    middle = {"background": float(amap.min()), "pixel": float(amap.min() + amap.max()) / 2}
    return data_uri(Image.fromarray(colours(amap, middle | limits)).quantize(COLOURS), "PNG", optimize=True)
