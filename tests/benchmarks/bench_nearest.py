"""Seconds per image of PatchCore's search in a bank of 57,000 rows of 384 numbers, beside a comparison with all rows.

On features as a network has them (few directions, and a rest), on bottle's where ANOMALIB_LITE_DATA is set, and on
random ones, where a bound rules nothing out.
"""

import statistics
import time

import pytest
import torch
from torch import Tensor

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_mvtec
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.nearest import Bank, nearest_in_parts
from anomalib_lite.methods.patches import patch_features
from tests.benchmarks.bench_coreset import WEIGHTS
from tests.helpers import real_images as real

ROWS, WIDTH, IMAGES = 57_000, 384, 6


def measure(rows: Tensor, images: Tensor) -> tuple[float, float]:
    """Median processor seconds per image of the search and of the comparison with all rows, which find the same."""
    bank, seconds = Bank(rows, torch.arange(len(rows))), list[tuple[float, float]]()
    for x in images:
        start = time.process_time()
        distance, index = bank.nearest(x[None])
        middle = time.process_time()
        every = nearest_in_parts(x, rows, bank.size)
        seconds.append((middle - start, time.process_time() - middle))
        slow = torch.linalg.vector_norm(x - rows[every], dim=1)
        torch.testing.assert_close(distance[0], slow, rtol=1e-5, atol=1e-5)
        assert (index[0] == every).float().mean() > 0.999
    fast, slow_seconds = zip(*seconds[1:], strict=True)
    return statistics.median(fast), statistics.median(slow_seconds)


def clustered(count: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    directions = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(9))
    return (torch.randn(count, 48) @ directions).relu() + 0.5 * torch.randn(count, WIDTH)


def bottle() -> tuple[Tensor, Tensor]:
    """57,000 patches of training images and those of some test images."""
    data = AnomalyDataModule(read_mvtec, real.parts(), "bottle", image_size=256, eval_batch_size=IMAGES)
    data.setup()
    net = Backbone("resnet18", [2, 3], str(real.weights() / WEIGHTS))
    each = [patch_features(net(batch["image"])).movedim(1, -1).flatten(1, 2) for batch in data.fit_dataloader()]
    patches = torch.cat(each).flatten(0, 1)
    rows = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:ROWS]]
    batch = next(iter(data.test_dataloader()))
    return rows, patch_features(net(batch["image"])).movedim(1, -1).flatten(1, 2)


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["clustered", "random", "bottle"])
@torch.no_grad()
def test_bench_search(kind, capsys):
    torch.manual_seed(0)
    if kind == "bottle":
        rows, images = bottle()
    elif kind == "random":
        rows, images = torch.randn(ROWS, WIDTH), torch.randn(IMAGES, 1024, WIDTH)
    else:
        rows, images = clustered(ROWS, 1), clustered(IMAGES * 1024, 0).view(IMAGES, 1024, WIDTH)
    fast, slow = measure(rows, images)
    with capsys.disabled():
        print(f"\n{kind}: {fast:.3f} s an image; compared with all rows {slow:.3f} s")
    if kind != "random":
        assert fast < slow / 2
