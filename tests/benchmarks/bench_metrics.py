"""Time and memory of all pixel metrics together on 83 million pixels, beside one AUROC of others on the same arrays."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from anomalib_lite.metrics.functional import pixel_metrics


def blobs_and_scores(images=83, side=1000, share=0.04):
    """Skewed scores in [0, 1), smooth as those of methods are, and blobs on two of three images."""
    rng = np.random.default_rng(0)
    maps = np.empty((images, side, side), np.float32)
    masks = np.zeros(maps.shape, bool)
    for i in range(images):
        field = ndimage.zoom(rng.standard_normal((side // 20, side // 20), np.float32), 20, order=1)
        if i % 3:
            masks[i] = field > np.quantile(field, 1 - share)
        rough = ndimage.zoom(rng.standard_normal((side // 8, side // 8), np.float32), 8, order=1)
        noise = rough + 0.1 * rng.standard_normal((side, side), np.float32) + 1.5 * masks[i]
        maps[i] = 1 / (1 + np.exp(4 - 1.2 * noise))
    return maps, masks


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(call):
    """Result, seconds and GiB of resident memory at the peak beyond that before the call."""
    before, peak, done = resident(), 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return result, seconds, max(peak - before, 0) / 2**30


@pytest.mark.bench
def test_bench_pixel_metrics(capsys):
    maps, masks = blobs_and_scores()
    pixel_metrics(maps[:1], masks[:1])  # libraries load their parts at the first call
    scores, labels = maps.ravel(), masks.ravel()
    calls = {
        "pixel_metrics, all of them": lambda: pixel_metrics(maps, masks)["pixel_auroc"],
        "scikit-learn roc_auc_score": lambda: roc_auc_score(labels, scores),
        # scores within [0, 1], or it would put a sigmoid on top of them
        "torchmetrics binary_auroc": lambda: binary_auroc(
            torch.from_numpy(scores), torch.from_numpy(labels).long(), thresholds=None
        ).item(),
    }
    rows = {name: measure(call) for name, call in calls.items()}
    (auroc, ours, memory), (slow, sklearn_s, _), (_, torchmetrics_s, _) = rows.values()
    with capsys.disabled():
        print(f"\n{maps.size / 1e6:.0f} million float32 pixels, {masks.mean():.1%} positive, {os.cpu_count()} cores")
        print(f"{'':28}{'s':>8}{'ratio':>8}{'+GiB':>8}{'AUROC':>12}")
        for name, (value, seconds, gib) in rows.items():
            print(f"{name:28}{seconds:8.2f}{seconds / ours:8.1f}{gib:8.2f}{value:12.8f}")
    assert auroc == pytest.approx(slow, abs=1e-9)
    assert sklearn_s > 10 * ours
    assert torchmetrics_s > 5 * ours
    assert memory < 1.5
