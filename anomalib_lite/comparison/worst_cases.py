"""Heat maps of the same image under every method, worst cases first, and the curves: what a page shows of the maps."""

import base64
import inspect
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.comparison.cells import Row, Table
from anomalib_lite.comparison.find_runs import Run, inner
from anomalib_lite.comparison.statistics import disagreement
from anomalib_lite.metrics.functional import CURVES

MOST_METHODS = 8  # in curves and heat maps: the best
TILE = 128  # pixels of an image's thumbnail


@dataclass
class Case:
    """A test image: its thumbnail (a data URI, or nothing), and per method the heat map and the score relative to the
    threshold (None where there is none)."""

    path: str
    label: int
    rank: float
    picture: str = ""
    maps: list[tuple[str, float | None]] = field(default_factory=list)


def chosen(table: Table, metric: str, most: int = MOST_METHODS) -> list[Row]:
    """The best rows by the mean of their categories, in the table's order."""

    def quality(row: Row) -> tuple[int, float]:
        means = table.means(row, metric)
        return len(means), float(np.mean(list(means.values()))) if means else 0.0

    best = sorted(table.rows, key=quality, reverse=True)[:most]
    return [row for row in table.rows if any(row is one for one in best)]


def run_of(row: Row, category: str) -> Run | None:
    """The run that stands for the row: the one with the smallest seed."""
    seeds = row.runs.get(category, {})
    return seeds[min(seeds)] if seeds else None


class Maps:
    """maps.npz of the runs, each opened when it is asked for; what can't be read goes to `problems`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def read(self, run: Run, keys: list[str]) -> dict[str, np.ndarray]:
        """Those of the keys that the file holds."""
        try:
            with np.load(run.folder / "maps.npz", allow_pickle=False) as file:
                return {key: file[key] for key in keys if key in file.files}
        except Exception as error:  # zipfile, zlib and NumPy each have their own
            why = getattr(error, "strerror", None) or error
            self.problems.append(f"{run.folder / 'maps.npz'}: not readable, so no curves and heat maps of it ({why})")
            return {}

    def curves(self, run: Run, category: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The points of each of CURVES, up to its limit."""
        names = {name: (f"{category}/{x}", f"{category}/{y}") for name, (x, y, *_) in CURVES.items()}
        points = self.read(run, [key for pair in names.values() for key in pair])
        found = {}
        for name, (x, y) in names.items():
            if x in points and y in points and points[x].shape == points[y].shape and points[x].ndim == 1:
                found[name] = cut(points[x].astype(np.float64), points[y].astype(np.float64), CURVES[name][4])
        return found

    def heat(self, run: Run) -> tuple[dict[str, int], np.ndarray, float]:
        """Row by path, maps [N, h, w] float16, and their scale."""
        content = self.read(run, ["maps", "paths", "scale"])
        if len(content) < 3 or content["maps"].ndim != 3 or len(content["maps"]) != len(content["paths"]):
            return {}, np.zeros((0, 1, 1)), 1.0
        return {str(path): i for i, path in enumerate(content["paths"])}, content["maps"], float(content["scale"])


def cut(x: np.ndarray, y: np.ndarray, limit: float, most: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """The curve from 0 to `limit`, interpolated there, thinned to `most` points."""
    inside = x <= limit
    if not inside.all() and inside.any():
        end = np.interp(limit, x, y)
        x, y = np.append(x[inside], limit), np.append(y[inside], end)
    keep = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int)) if len(x) > most else np.arange(len(x))
    return x[keep], y[keep]


def worst_cases(category: str, rows: list[Row], maps: Maps, most: int, budget: int) -> list[Case]:
    """The images whose ranks contradict their labels most, averaged over `rows`; about `budget` bytes at most."""
    found = [run_of(row, category) for row in rows]
    scored = [run.scores(maps.problems).get(category) if run else None for run in found]
    paths = next((one[0] for one in scored if one), ())
    same = [one for one in scored if one and one[0] == paths]
    if not same:
        return []
    rank = np.mean([disagreement(labels, scores) for _, labels, scores in same], axis=0)
    worst = np.argsort(-rank, kind="stable")[:most]
    cases = [Case(paths[i], int(same[0][1][i]), float(rank[i])) for i in worst]
    places = [place for run in found if run and (place := root_of(run))]
    for case in cases:
        case.picture = thumbnail(places, case.path)
    for run, one in zip(found, scored, strict=True):  # a run's maps are in memory one run at a time
        at, stack, scale = maps.heat(run) if run else ({}, np.zeros((0, 1, 1)), 1.0)
        threshold = thresholds(run, category) if run else {}
        by_path = dict(zip(one[0], one[2], strict=True)) if one else {}
        for case in cases:
            score = by_path.get(case.path)
            limit = threshold.get("image")
            ratio = float(score / limit) if score is not None and limit else None
            picture = heat_map(stack[at[case.path]].astype(np.float64) * scale, threshold) if case.path in at else ""
            case.maps.append((picture, ratio))
    while cases and sum(len(c.picture) + sum(len(m) for m, _ in c.maps) for c in cases) > budget:
        cases.pop()
    return cases


def thresholds(run: Run, category: str) -> dict[str, float]:
    """`image`, `pixel`, `background`, those that are there."""
    found = inner(run.result, "thresholds", "per_category", category)
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def root_of(run: Run) -> Path | None:
    """Where the run's images lay."""
    data = run.config.get("data")
    if not isinstance(data, dict):
        return None
    if data.get("root"):
        return Path(str(data["root"])).expanduser()
    reader = data.get("reader")
    if isinstance(reader, dict) and str(reader.get("_target_", "")).endswith(".read_synthetic"):
        from anomalib_lite.data.synthetic import VERSION, read_synthetic

        of = {name: parameter.default for name, parameter in inspect.signature(read_synthetic).parameters.items()}
        of |= reader
        name = f"v{VERSION}-seed{of['seed']}-size{of['size']}-{of['train']}-{of['good']}-{of['defective']}"
        cache = os.environ.get("ANOMALIB_LITE_CACHE") or "~/.cache/anomalib_lite"
        return Path(cache).expanduser() / "synthetic" / name
    return None


def thumbnail(roots: list[Path], path: str) -> str:
    """The image as a JPEG data URI, or nothing if it is gone."""
    from PIL import Image

    from anomalib_lite.data.samples import load_rgb

    for root in dict.fromkeys(roots):
        if ".." in Path(path).parts or not (root / path).is_file():
            continue
        try:
            picture = Image.fromarray(load_rgb(root / path)).resize(
                (TILE, TILE), Image.Resampling.BILINEAR, reducing_gap=2
            )
        except Exception:  # a damaged image is no reason for no page
            continue
        return _uri(picture, "JPEG", quality=80)
    return ""


def heat_map(amap: np.ndarray, threshold: dict[str, float]) -> str:
    """A map [h, w] as a PNG data URI: dark at normal images' background, brightest at twice the pixels' threshold."""
    from PIL import Image

    low = threshold.get("background", float(amap.min()))
    high = 2 * threshold["pixel"] if "pixel" in threshold else float(amap.max())
    level = np.clip(np.nan_to_num((amap - low) / max(high - low, 1e-12)), 0, 1)
    picture = Image.fromarray((level * 63).astype(np.uint8) * 4, "L").convert("P")
    picture.putpalette(_palette())
    return _uri(picture, "PNG", optimize=True)


def _palette() -> bytes:
    import cv2

    ramp = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO)[:, 0, ::-1].tobytes()


def _uri(picture: Any, kind: str, **options: Any) -> str:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
