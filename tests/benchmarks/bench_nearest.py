"""Seconds per image of PatchCore's search in a bank of 57,000 rows of 384 numbers, beside one product with all rows."""

import statistics
import time

import pytest
import torch

from anomalib_lite.methods.nearest import Bank

ROWS, WIDTH, PATCHES, IMAGES = 57_000, 384, 1024, 5


@pytest.mark.bench
@torch.no_grad()
def test_bench_search(capsys):
    torch.manual_seed(0)
    rows, images = torch.randn(ROWS, WIDTH), torch.randn(IMAGES, PATCHES, WIDTH)
    bank, seconds = Bank(rows, torch.arange(ROWS)), list[tuple[float, float]]()
    for x in images:
        start = time.process_time()
        distance = bank.nearest(x[None])[0]
        middle = time.process_time()
        every = torch.addmm(rows.square().sum(1), x, rows.T, alpha=-2).argmin(1)
        slow = torch.linalg.vector_norm(x - rows[every], dim=1)
        seconds.append((middle - start, time.process_time() - middle))
        torch.testing.assert_close(distance[0], slow)
    ours, one = (statistics.median(each) for each in zip(*seconds[1:], strict=True))
    with capsys.disabled():
        print(f"\nsearch: {ours:.3f} s of processor time an image; in one product {one:.3f} s")
    assert ours < 1.1 * one
