"""The files with a run's results, written and read here: result.json, scores.csv and maps.npz."""

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomalib_lite.errors import UserError
from anomalib_lite.paths import readable_texts, replacing, write_text
from anomalib_lite.runs import folder

SCHEMA = 1
MAP_SIZE = 64
#: columns of the normal training and held-out images, from which thresholds follow; their keys in maps.npz
NORMAL_KEYS = {
    "scores": "normal/scores", "map_max": "normal/peaks", "map_median": "normal/medians",
    "categories": "normal/categories", "held_out": "normal/held_out",
}  # fmt: skip


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Write result.json. ValueError for a NaN or infinity in it, which is an error of this package."""
    write_text(run / folder.RESULT, json.dumps(readable_texts(result), indent=1, allow_nan=False) + "\n")


def read_result(run: Path) -> dict[str, Any]:
    """A run's result.json; UserError where it does not exist or is damaged."""
    file = run / folder.RESULT
    try:
        result = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; is {run} the folder of a finished run?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as a result ({error})") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{file}: not a result of this version (schema {SCHEMA})")
    return result


def thresholds_of(run: Path, category: str | None, quantile: float | None) -> dict[str, Any]:
    """A run's thresholds for a category, at the run's or another quantile.

    Returns:
        `category`, and `image`, `pixel`, `background`, `images` and `quantile` as `per_category.thresholds` has them.

    Raises:
        UserError: the category is not one of the run's, the quantile is invalid, or maps.npz can't be read.
    """
    from anomalib_lite.metrics.per_category import thresholds

    stored = read_result(run)["thresholds"]
    names = list(stored["per_category"])
    if category is None and len(names) > 1:
        raise UserError(f"category= is not set: this run's model has several, {', '.join(names)}; choose one")
    if category is not None and category not in names:
        raise UserError(f"category={category}: this run's categories are {', '.join(names)}")
    if quantile is not None:
        if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 < quantile <= 1:
            raise UserError(f"quantile={quantile}: give a share above 0 and at most 1")
        stored = thresholds(read_normal(run), quantile)
    chosen = {"category": category or names[0], "quantile": stored["quantile"]}
    return chosen | stored["per_category"][category or names[0]]


def write_scores(run: Path, outputs: dict[str, Any]) -> None:
    """scores.csv: one row per test image; the scores with all their digits."""
    columns = [outputs[name].tolist() for name in ("paths", "categories", "defects", "labels", "scores")]
    with (run / folder.SCORES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "category", "defect", "label", "score"])
        for *texts, score in zip(*columns, strict=True):
            writer.writerow([*texts, repr(score)])


def write_maps(
    run: Path, outputs: dict[str, Any], curves: dict[str, np.ndarray], normal: dict[str, np.ndarray]
) -> None:
    """maps.npz: `maps` float16 [N, 64, 64] divided by `scale` (so that float16 holds them) and `paths` of the test
    images; the curves' points; and the columns of the normal images, from which thresholds follow.
    """
    import cv2

    maps = np.empty((len(outputs["maps"]), MAP_SIZE, MAP_SIZE), np.float32)
    for small, amap in zip(maps, outputs["maps"], strict=True):
        small[:] = cv2.resize(amap, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA)
    scale = np.float32(max((float(np.abs(small).max()) for small in maps), default=1) or 1)
    maps /= scale
    stored = {"maps": maps.astype(np.float16), "scale": scale, "paths": outputs["paths"], **curves}
    with replacing(run / folder.MAPS) as part:
        np.savez_compressed(part, **stored, **{key: normal[column] for column, key in NORMAL_KEYS.items()})  # type: ignore[arg-type]


def read_normal(run: Path) -> dict[str, np.ndarray]:
    """The columns of the normal images in maps.npz. Raise UserError if the file is damaged or lacks them."""
    try:
        stored = read_maps(run, NORMAL_KEYS.values())
        held_out = NORMAL_KEYS["held_out"]
        if held_out not in stored:  # a run from before thresholds came from held-out images too
            stored[held_out] = np.zeros(len(stored[NORMAL_KEYS["scores"]]), bool)
        return {column: stored[key] for column, key in NORMAL_KEYS.items()}
    except (UserError, KeyError) as error:
        raise UserError(
            f"{error}: thresholds for another quantile or test set need the scores of normal images in "
            f"{run / folder.MAPS}; leave quantile= or data.root= out"
        ) from error


# what a comparison reads


class Scores(NamedTuple):
    """The test images of one category in scores.csv, sorted by path; labels are 0 or 1 [N], scores float64 [N]."""

    paths: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray


def read_scores(run: Path) -> dict[str, Scores]:
    """A run's scores.csv by category. Raise UserError if the file is missing or damaged."""
    file = run / folder.SCORES
    rows: dict[str, list[tuple[str, int, float]]] = {}
    try:
        with file.open(newline="", encoding="utf-8", errors="replace") as opened:
            reader = csv.reader(opened)
            if next(reader, None) != ["path", "category", "defect", "label", "score"]:
                raise UserError(f"{file}: not readable (not the columns path, category, defect, label, score)")
            for path, category, _, label, score in reader:
                rows.setdefault(category, []).append((sys.intern(path), int(label), float(score)))
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror or error})") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: not readable (line {reader.line_num}: {error})") from error
    found = {}
    for category, entries in rows.items():
        paths, labels, scores = zip(*sorted(entries), strict=True)
        if not set(labels) <= {0, 1} or not np.isfinite(scores).all():
            raise UserError(f"{file}: not readable ({category}: a label is not 0 or 1, or a score is not finite)")
        found[category] = Scores(paths, np.array(labels), np.array(scores, np.float64))
    return found


def read_maps(run: Path, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the keys that a run's maps.npz holds. Raise UserError if the file is missing or damaged."""
    file = run / folder.MAPS
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in keys if key in stored.files}
    except Exception as error:  # zipfile, zlib and NumPy raise different classes for a damaged archive
        raise UserError(f"{file}: not readable ({getattr(error, 'strerror', None) or error})") from error
