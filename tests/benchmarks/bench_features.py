"""What the feature cache saves and costs: an epoch with it, without it and from memory; filling it; memory it takes."""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.stored_features import Rows, StoredFeatures
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.cache import FeatureFiles
from anomalib_lite.features.precompute import as_rows, shapes_of, smallest_type
from tests.benchmarks.bench_training import our_loop, seconds
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import folder_data

WIDE = "wide_resnet50_2.tv_in1k"
SIDE, BATCH, ROUNDS = 256, 8, 3


@pytest.mark.bench
def test_bench_epoch(capsys, tmp_path):
    """A step of norm_occ, from one beginning to the next: an epoch is so many of them.

    Two runs with features from memory differ by up to a tenth. So the copy of a batch's rows is timed alone: all else
    of a step is the same with features from the cache and from memory.
    """
    make_mvtec(tmp_path / "data", train=16, good=1, defects={"broken": 1}, size=SIDE)
    common = [
        "method=norm_occ", "method._target_=tests.benchmarks.bench_training.Timed", *folder_data(tmp_path / "data"),
        f"data.image_size={SIDE}", f"data.batch_size={BATCH}", "trainer.max_epochs=null", "hardware.threads=1",
        f"backbone={WIDE.partition('.')[0]}",
    ]  # fmt: skip
    kinds = {
        "cache": [f"cache.folder={tmp_path / 'cache'}", "trainer.max_steps=40"],
        "memory": ["cache.enabled=false", "trainer.max_steps=40"],
        "recomputed": ["cache.enabled=false", "hardware.feature_memory_gb=0", "trainer.max_steps=10"],
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(ROUNDS):
        for kind, arguments in kinds.items():
            run = tmp_path / f"{kind}{number}"
            times[kind].append(our_loop([*common, *arguments], run))
            assert json.loads((run / "result.json").read_text())["cache"]["used"] == (kind == "cache")
    best = {kind: min(each) for kind, each in times.items()}
    with capsys.disabled():
        print(f"\nnorm_occ, wide_resnet50_2 with random weights, batch {BATCH}, {SIDE}², processor time a step")
        for kind, taken in best.items():
            print(f"  features from {kind:12}{1000 * taken:8.0f} ms, {taken / best['cache']:.2f} times the cache's")
        copies = copying(tmp_path / "copies")
        for kind, taken in copies.items():
            share = taken / best["memory"]
            print(f"  copying a batch's rows from {kind:12}{1000 * taken:6.2f} ms, {share:.2%} of a step")
    assert best["recomputed"] >= 4 * best["cache"]
    assert copies["cache"] - copies["memory"] <= 0.01 * best["memory"]


def copying(folder: Path) -> dict[str, float]:
    """Processor time to gather a batch of wide_resnet50_2's rows, from a mapped file and from memory in turn."""
    levels = [torch.randn(16, 512, 32, 32).bfloat16(), torch.randn(16, 1024, 16, 16).bfloat16()]
    table, names = as_rows(levels, torch.bfloat16), [str(i) for i in range(16)]
    files, cached = FeatureFiles(folder, {}), StoredFeatures(Pipeline([], (), "imagenet"))
    files.write(names, table, shapes_of(levels))
    files.load(dict(zip(names, names, strict=True)), cached)
    sources = {
        "cache": Rows(cached.tables, [cached.places[name] for name in names], cached.shapes),
        "memory": Rows([table], [(0, row) for row in range(16)], cached.shapes),
    }
    times: dict[str, list[float]] = {kind: [] for kind in sources}
    for _ in range(200):
        indices = torch.randperm(16)[:BATCH]
        for kind, rows in sources.items():
            times[kind].append(seconds(partial(rows.gathered, indices))[1])
    return {kind: statistics.median(each) for kind, each in times.items()}


@pytest.mark.bench
def test_bench_filling(capsys, tmp_path):
    """The same batches through the backbone alone, and with their outputs written."""
    backbone = Backbone(WIDE, [2, 3], "none")
    batches = [torch.randn(16, 3, SIDE, SIDE) for _ in range(3)]

    def bare():
        for images in batches:
            backbone(images)

    def filling(folder: Path):
        files, rows = FeatureFiles(folder, {}), []
        for images in batches:
            levels = backbone(images)
            rows.append(as_rows(levels, smallest_type(levels)))
        files.write([str(i) for i in range(16 * len(batches))], torch.cat(rows), shapes_of(levels))

    bare()
    rounds = [(seconds(bare), seconds(partial(filling, tmp_path / str(i)))) for i in range(ROUNDS)]
    with capsys.disabled():
        print(f"\nfilling with wide_resnet50_2's features, 16 images a pass, {SIDE}²")
        for clock, name in enumerate(("wall", "processor")):
            alone, both = (min(row[part][clock] for row in rounds) for part in range(2))
            print(f"  {name:9} time: backbone {alone:6.2f} s, with writing {both:6.2f} s: {both / alone - 1:+.1%}")
    assert both <= 1.1 * alone  # of processor time


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.bench
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_bench_memory(capsys, tmp_path):
    """All batches of an epoch, from caches of two sizes."""
    levels = [torch.randn(16, 512, 32, 32).bfloat16(), torch.randn(16, 1024, 16, 16).bfloat16()]
    grown, size = {}, 0
    for count in (64, 1024):
        files = FeatureFiles(tmp_path / str(count), {})
        for at in range(0, count, 64):
            rows = as_rows(levels, torch.bfloat16).repeat(4, 1)
            files.write([str(at + i) for i in range(64)], rows, shapes_of(levels))
        del rows
        before, start = anonymous(), time.perf_counter()
        stored = StoredFeatures(Pipeline([], (), "imagenet"))
        files.load({str(i): str(i) for i in range(count)}, stored)
        peak = 0
        for at in range(0, count, BATCH):
            batch = torch.stack([stored.row(str(at + i)) for i in range(BATCH)]).float()
            peak = max(peak, anonymous() - before)
        grown[count] = peak
        size = sum(file.stat().st_size for file in (tmp_path / str(count)).glob("*/*.safetensors"))
        with capsys.disabled():
            print(
                f"\n{count} images, {size / 2**20:.0f} MiB on disk: {peak / 2**20:.0f} MiB of anonymous memory more",
                end="",
            )
            print(f" while an epoch is read in {time.perf_counter() - start:.1f} s (batches of {BATCH})")
        del stored, batch
    assert grown[1024] - grown[64] < 0.02 * size
