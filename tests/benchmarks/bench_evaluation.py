"""Peak memory of evaluations with many images: a test of 3,200 images, and 57,800 made-up maps (as many as Real-IAD).

Each in a process of its own, so that the peak of memory is this work's.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_lite.data.samples import Sample
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.per_category import measure_categories
from anomalib_lite.runs.artifacts import NORMAL_KEYS, write_maps, write_scores
from anomalib_lite.runs.devices import peak_resident
from anomalib_lite.runs.test_outputs import NORMAL, TEST, Evaluation
from tests.helpers import run_programs as runs

SIDE, BATCH = 256, 32
CONFIG = """
# @package _global_
defaults:
  - override /backbone: none
method: {_target_: tests.benchmarks.bench_evaluation.Brightness}
trainer: {max_epochs: 0}
"""


class Brightness(AnomalyModule):
    """The map is the image's first channel."""

    uses_backbone = False

    def anomaly_map(self, batch: dict[str, Any]) -> torch.Tensor:
        return batch["image"][:, 0]


def write_images(root: Path, tested: int) -> None:
    """Noise of 32 x 32 pixels as train and test images of `part`; five kinds of defects, each as often as good ones."""
    rng = np.random.default_rng(0)
    for i in range(64 + tested):
        kind = ("good", "bent", "cut", "hole", "scratch", "stain")[i % 6 if i % 2 else 0]
        folder = root / "part" / ("train/good" if i < 64 else f"test/{kind}")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (32, 32, 3), np.uint8)
        if i >= 64 and kind != "good":
            mask = np.zeros((32, 32), np.uint8)
            mask[8 : 8 + i % 7, 9 : 9 + i % 11] = 255
            pixels[mask > 0] += 40
            (root / "part/ground_truth" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "part/ground_truth" / kind / f"{i}_mask.png")
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.bench
def test_bench_a_test_of_3200_images(tmp_path, capsys):
    write_images(tmp_path / "data", 3200)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/brightness.yaml").write_text(CONFIG)
    options = ["hardware=cpu", "logger=csv", "hardware.measure_cost=false", f"data.image_size={SIDE}"]
    options += [f"--config-dir={tmp_path / 'conf'}", "method=brightness", *runs.folder_data(tmp_path / "data", "part")]
    started = time.perf_counter()
    program = ("-m", "anomalib_lite.train", *options, f"hydra.run.dir={tmp_path / 'run'}")
    done = runs.python(*program, cwd=runs.ROOT, timeout=1800)
    assert done.code == 0, done.err
    peak = json.loads((tmp_path / "run/result.json").read_text())["timing"]["peak_memory_mb"]["host"] / 1024
    with capsys.disabled():
        print(f"\na test of 3,200 images of {SIDE}²: {time.perf_counter() - started:.0f} s, {peak:.2f} GiB at the peak")
    assert peak <= 2.5e9 / 2**30


def main(folder: str, count: str) -> None:
    """Collect, measure and store `count` made-up maps in 30 categories; print seconds and the peak of memory."""
    evaluation, total = Evaluation(Path(folder)), int(count)
    pool = torch.from_numpy(np.random.default_rng(0).standard_normal((64, SIDE, SIDE), np.float32))
    kinds = [("good", "cut", "hole", "good", "dent")[i % 5] for i in range(total)]
    samples = [
        Sample(Path(f"{i}.png"), f"part {i * 30 // total}", kind, int(kind != "good"), None)
        for i, kind in enumerate(kinds)
    ]
    started = time.perf_counter()
    for start in range(0, total, BATCH):
        index = torch.arange(start, min(start + BATCH, total))
        label = torch.tensor([samples[i].label for i in index])
        mask = torch.zeros(len(index), SIDE, SIDE, dtype=torch.bool)
        mask[label > 0, 60:90, 70:110] = True
        maps = pool[(index * 7 + index // 64) % 64] + (index % 101)[:, None, None] / 1000 + mask
        batch = {"index": index, "label": label, "mask": mask, "path": ["?"] * len(index)}
        outputs = {"map": maps, "score": maps.amax((1, 2))}
        evaluation.on_test_batch_end(None, None, outputs, batch, 0, TEST)  # type: ignore[arg-type]
    test = evaluation.gather({TEST: samples, NORMAL: [], 2: []}, Path())[TEST]
    collected = time.perf_counter()
    categories = dict.fromkeys(sample.category for sample in samples)
    limits = {name: {"pixel": 4.0} for name in categories}
    found = measure_categories(test, dict.fromkeys(categories, True), [0.3, 0.05], limits)
    measured = time.perf_counter()
    write_scores(Path(folder), test)
    write_maps(Path(folder), test, found.curves, dict.fromkeys(NORMAL_KEYS, np.zeros(1)))
    seconds = (collected - started, measured - collected, time.perf_counter() - measured)
    print(*seconds, peak_resident() / 2**30)


@pytest.mark.bench
def test_bench_57800_maps(tmp_path, capsys):
    """It writes 15 GB into a temporary file."""
    program = ("-m", "tests.benchmarks.bench_evaluation", tmp_path, "57800")
    done = runs.python(*program, cwd=runs.ROOT, timeout=3600)
    assert done.code == 0, done.err
    *seconds, peak = map(float, done.out.split())
    parts = zip(seconds, ("collected", "measured", "stored"), strict=True)
    with capsys.disabled():
        print(f"\n57,800 maps of {SIDE}²: {', '.join(f'{what} in {s:.0f} s' for s, what in parts)}, {peak:.2f} GiB")
    assert peak <= 6e9 / 2**30


if __name__ == "__main__":
    main(*sys.argv[1:])
