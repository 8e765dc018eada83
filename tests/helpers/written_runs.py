"""Runs for comparisons: copies of a real one with other numbers."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.comparison import find_runs, grouping
from anomalib_lite.comparison.tables import Table
from anomalib_lite.metrics.functional import image_curves, image_metrics
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import Outcome, folder_data, result_of, run

ODD = '<script>alert("x")</script> & co_%'


def compare(*arguments: str | Path) -> Outcome:
    from anomalib_lite.compare import main

    return run(main, *arguments)


def real_run(folder: Path) -> Path:
    """A run as the program leaves it, with its data beside it."""
    make_mvtec(folder / "data", good=4, defects={"broken": 5})
    result_of(*folder_data(folder / "data"), "method=norm_occ_closed_form", run_dir=folder / "run")
    return folder / "run"


class Writer:
    """Writes runs in the format of a real one."""

    def __init__(self, real: Path, root: Path) -> None:
        self.root, self.count = root, 0
        self.result = json.loads((real / "result.json").read_text())
        self.result["timing"]["beside"] = None  # other programs of this machine
        self.config = json.loads((real / "checkpoints" / "config.json").read_text())
        with np.load(real / "maps.npz") as file:
            self.maps, self.scale = file["maps"], file["scale"]
        with (real / "scores.csv").open() as file:
            self.rows = list(csv.reader(file))

    def __call__(
        self,
        method="a",
        categories=("bottle",),
        seed=0,
        quality=1.0,
        config=None,
        maps=False,
        root=None,
        **changes: Any,
    ) -> Path:
        """A run with images in the folder `root`; `changes` replace what result.json holds, `a__b` its key b in a."""
        folder = self.root / f"run{self.count:04}"
        (folder / "checkpoints").mkdir(parents=True)
        self.count += 1
        result, rng = copy.deepcopy(self.result), np.random.default_rng(self.count)
        rows, curves = [self.rows[0]], dict[str, Any]()
        result |= {"method": method, "seed": seed, "categories": list(categories), "per_category": {}}
        result["setting"] = "single" if len(categories) == 1 else "unified"
        for category in categories:
            labels = np.array([int(row[3]) for row in self.rows[1:]])
            scores = rng.normal(quality * labels)
            for row, score in zip(self.rows[1:], scores, strict=True):
                path = row[0].replace("bottle", category, 1)
                rows.append([path, category, row[2], row[3], repr(float(score))])
            pixel = {key: float(rng.uniform()) for key in self.result["metrics"] if not key.startswith("image")}
            result["per_category"][category] = image_metrics(scores, labels) | pixel
            curves |= {f"{category}/{key}": value for key, value in image_curves(scores, labels).items()}
        for counts in ("train_counts", "test_counts"):
            result["data"][counts] = dict.fromkeys(categories, self.result["data"][counts]["bottle"])
        limits = self.result["thresholds"]["per_category"]["bottle"]
        result["thresholds"]["per_category"] = dict.fromkeys(categories, limits)
        result["data"]["fingerprint"] = "+".join(categories)
        for key, value in changes.items():
            *groups, last = key.split("__")
            part = result
            for group in groups:
                part = part[group]
            part[last] = value
        (folder / "result.json").write_text(json.dumps(result))
        stored = copy.deepcopy(self.config)
        stored["config"]["seed"] = seed
        stored["config"]["method"] |= config or {}
        stored["config"]["data"]["root"] = str(root or self.config["config"]["data"]["root"])
        (folder / "checkpoints" / "config.json").write_text(json.dumps(stored))
        with (folder / "scores.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        if maps:
            stack = np.concatenate([self.maps] * len(categories))
            paths = np.array([row[0] for row in rows[1:]])
            np.savez_compressed(folder / "maps.npz", maps=stack, scale=self.scale, paths=paths, **curves)
        return folder


def tables(write: Writer) -> list[Table]:
    runs, left_out = find_runs.read([write.root], [])
    assert not left_out
    return grouping.tables(runs)


def sample_runs(write: Writer) -> None:
    """Two categories, two seeds, and three methods of different quality, one with characters that need escapes."""
    for seed in (0, 1):
        for category in ("bottle", ODD):
            for method, quality in (("weak", 0.2), ("strong", 3), (ODD, 1)):
                write(method, (category,), seed, quality, maps=True)
