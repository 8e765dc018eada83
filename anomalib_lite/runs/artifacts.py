"""What a run leaves on disk, written and read in one place."""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME, replacing, write_text
from anomalib_lite.runs.folder import MAPS, SCORES

SCHEMA = 1
MAP_SIZE = 64


def write_result(run: Path, result: dict[str, Any]) -> None:
    """result.json; a NaN or infinity in it is our fault and raises ValueError."""
    write_text(run / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def read_result(run: Path) -> dict[str, Any]:
    """A run's result.json; UserError where there is none or it is damaged."""
    file = run / "result.json"
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
    """A run's thresholds for a category, at its own or another quantile: `category`, `image`, `pixel`, `background`."""
    from anomalib_lite.runs.test_outputs import thresholds

    stored = read_result(run)["thresholds"]
    names = list(stored["per_category"])
    if category is None and len(names) > 1:
        raise UserError(f"category= is not set: this run's model has several, {', '.join(names)}; choose one")
    if category is not None and category not in names:
        raise UserError(f"category={category}: this run's categories are {', '.join(names)}")
    if quantile is not None:
        if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 < quantile <= 1:
            raise UserError(f"quantile={quantile}: give a share above 0 and at most 1")
        try:
            with np.load(run / "maps.npz", allow_pickle=False) as file:
                normal = {key: file[f"normal/{key}"] for key in ("scores", "peaks", "medians", "categories")}
        except Exception as error:  # of a damaged archive: BadZipFile, zlib.error, KeyError, ...
            raise UserError(f"{run / 'maps.npz'}: not readable, so quantile= can't be changed ({error})") from error
        stored = thresholds(normal, quantile)
    return {"category": category or names[0]} | stored["per_category"][category or names[0]]


def write_scores(run: Path, root: Path, samples: list[Sample], scores: np.ndarray) -> None:
    """scores.csv: an image a row; the scores with all their digits."""
    with (run / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "category", "defect", "label", "score"])
        for sample, score in zip(samples, scores, strict=True):
            path = sample.path.relative_to(root) if sample.path.is_relative_to(root) else sample.path
            writer.writerow([path.as_posix(), sample.category, sample.defect, sample.label, repr(float(score))])


def write_maps(run: Path, root: Path, samples: list[Sample], maps: np.ndarray, more: dict[str, np.ndarray]) -> None:
    """maps.npz: `maps` float16 [N, 64, 64] divided by `scale` (so that float16 holds them), `paths`, and `more`:
    the curves' points and the normal images' scores, which thresholds come from.
    """
    import cv2

    small = [cv2.resize(m, (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_AREA) for m in maps]
    scale = np.float32(max((float(np.abs(m).max()) for m in small), default=1) or 1)
    stacked = np.stack(small) if small else np.zeros((0, MAP_SIZE, MAP_SIZE), np.float32)
    paths = [s.path.relative_to(root).as_posix() if s.path.is_relative_to(root) else str(s.path) for s in samples]
    with replacing(run / "maps.npz") as part:
        np.savez_compressed(part, maps=(stacked / scale).astype(np.float16), scale=scale, paths=np.array(paths), **more)  # type: ignore[arg-type]


def environment(device: str) -> dict[str, Any]:
    """Versions, device and git revision."""
    packages = ("torch", "torchvision", "lightning", "timm", "numpy", "albumentations", "hydra-core")
    revision = None
    if (HOME / ".git").exists():  # the package's own checkout, not whatever repository a wheel was installed below
        revision = _git("rev-parse", "HEAD")
        revision += "+changes" if revision and _git("status", "--porcelain") else ""
    return {
        "python": platform.python_version(),
        "anomalib_lite": version("anomalib-lite"),
        **{package: version(package) for package in packages},
        "device": device,
        "git": revision or None,
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def heading(key: str) -> str:
    """A metric's key as a heading of two lines: image_auroc is image AUROC, aupro_30 is AUPRO @0.3."""
    level, name = key.split("_")
    if level == "aupro":
        return f"AUPRO\n@{int(name) / 100:g}"
    return f"{level}\n{ {'f1max': 'F1-max'}.get(name, name.upper()) }"


def metrics_table(result: dict[str, Any]) -> Table:
    """The metrics per category and their mean, in percent."""
    title = f"{result['method']} on {result['dataset']} ({result['setting']}), seed {result['seed']}, in percent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("\ncategory", overflow="fold")
    for key in result["metrics"]:
        table.add_column(heading(key), justify="right", no_wrap=True)
    rows = list(result["per_category"].items())
    means = [(f"{name} mean", metrics) for name, metrics in (result["groups"] or {}).items()]
    means += [("mean", result["metrics"])] * (len(rows) > 1)
    for part in (rows, means):
        for name, metrics in part:
            table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in metrics.values()))
        table.add_section()
    return table


def show(run: Path, result: dict[str, Any]) -> None:
    """Print the table, the notes, and where the files are."""
    console = Console(width=None if Console().is_terminal else 100)  # a pipe has no width of its own
    console.print(metrics_table(result))
    for note in result["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False, soft_wrap=True)
    if result["validation"]:
        told = ", ".join(f"{key} {100 * value:.1f}" for key, value in result["validation"].items() if value is not None)
        console.print(f"held-out training images: {told}", highlight=False, soft_wrap=True)
    timing, cost = result["timing"], result["efficiency"]
    console.print(
        f"{cost['parameters'] / 1e6:.1f} M parameters ({cost['trainable'] / 1e6:.1f} M trained), "
        f"{cost['flops_per_image'] / 1e9:.1f} GFLOP an image, latency {timing['latency_ms']:.0f} ms, "
        f"{timing['images_per_s']:.0f} images/s at batch {timing['batch_size']}, "
        f"peak memory {max(timing['peak_memory_mb'].values()) / 1024:.1f} GiB",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"trained {timing['steps']} steps in {timing['fit_s']:.1f} s, tested in {timing['test_s']:.1f} s",
        highlight=False,
    )
    for category, found in result["decisions"]["per_category"].items():
        shares = ((found["defective_found"], "defective images found"), (found["good_flagged"], "good ones flagged"))
        told = ", ".join(f"{100 * share:.0f} % of {what}" for share, what in shares if share is not None)
        if told:
            console.print(
                f"{category}: at the threshold ({result['thresholds']['quantile']:g} quantile of normal training "
                f"images) {told}",
                highlight=False,
                soft_wrap=True,
            )
    written = ("result.json", "scores.csv", "maps.npz", "metrics.csv", "figures", "checkpoints")
    there = ", ".join(name for name in written if (run / name).exists())
    console.print(f"{run}/ holds {there}", highlight=False, soft_wrap=True)


# what a comparison reads


class Scores(NamedTuple):
    """The test images of one category in scores.csv, sorted by path; labels are 0 or 1 [N], scores float64 [N]."""

    paths: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray


def read_scores(run: Path) -> dict[str, Scores]:
    """A run's scores.csv by category. Raise UserError if the file is missing or damaged."""
    file = run / SCORES
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
    file = run / MAPS
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in keys if key in stored.files}
    except Exception as error:  # zipfile, zlib and NumPy raise different classes for a damaged archive
        raise UserError(f"{file}: not readable ({getattr(error, 'strerror', None) or error})") from error
