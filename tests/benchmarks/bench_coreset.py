"""Seconds and memory of PatchCore's greedy coreset on bottle's patches: 10 % of 209 images at two levels of resnet18.

In a process of its own, so that the peak of memory is this work's.
"""

import sys
import time
from pathlib import Path

import pytest
import torch

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_mvtec
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.coreset import greedy_coreset
from anomalib_lite.methods.patches import patch_features
from anomalib_lite.runs.devices import peak_resident
from tests.helpers import real_images as real
from tests.helpers import run_programs as runs

WEIGHTS = "resnet18_imagenet1k_layers1-3.safetensors"


def main(parts: str, weights: str) -> None:
    data = AnomalyDataModule(read_mvtec, parts, "bottle", image_size=256)
    data.setup()
    backbone = Backbone("resnet18", [2, 3], weights)
    each = [
        patch_features(backbone(batch["image"])).movedim(1, -1).flatten(0, 2) for batch in data.train_eval_dataloader()
    ]
    patches = torch.cat(each)
    del each, backbone
    wall, processor = time.perf_counter(), time.process_time()
    picks = greedy_coreset(patches, len(patches) // 10)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = peak_resident() / 2**30
    print(wall, processor, peak, len(picks.unique()), len(patches))


@pytest.mark.bench
def test_bench_coreset(capsys):
    weights = real.weights() / WEIGHTS
    done = runs.python("-m", "tests.benchmarks.bench_coreset", real.parts(), weights, cwd=runs.ROOT, timeout=600)
    assert done.code == 0, done.err
    wall, processor, peak, picks, patches = map(float, done.out.split())
    with capsys.disabled():
        print(
            f"\ngreedy coreset of bottle, {picks:.0f} of {patches:.0f} patches, {torch.get_num_threads()} threads:",
            end="",
        )
        print(f" {wall:.1f} s, {processor:.1f} s of processor time; the process took {peak:.2f} GiB at its peak")
    assert wall <= 30
    assert peak < 2


if __name__ == "__main__":
    main(*map(str, map(Path, sys.argv[1:])))
