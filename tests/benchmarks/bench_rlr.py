"""An RLR training step with the shapes of EfficientNet-B6 beside a plain float32 version that recomputes its features,
and the local window in its forms. CPU time of this process and its threads: other work on the machine counts little."""

import math
import statistics
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.attention import LocalWindow
from anomalib_lite.methods.rlr import RLR
from anomalib_lite.methods.transformer import near, sine_positions

BATCH, ROUNDS = 4, 3


class PlainLayer(nn.Module):
    def __init__(self, dim: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.local, self.masked = (nn.MultiheadAttention(dim, 8, batch_first=True) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, r, inside):
        a, _ = self.local(x, r, r, attn_mask=~inside, need_weights=not self.fused)
        b, _ = self.masked(x, r, x, attn_mask=inside, need_weights=not self.fused)
        y = self.norm1(2 * a + b)
        return self.norm2(y + self.ffn(y))


class PlainLevel(nn.Module):
    """As the paper has it, with PyTorch's own parts, every image with its copy of the reference.

    `fused`: nn.MultiheadAttention knows that its weights are not needed, and computes in one kernel.
    """

    inside: torch.Tensor
    positions: torch.Tensor

    def __init__(self, channels: int, side: int, window: int, dim: int, fused: bool):
        super().__init__()
        self.reference = nn.Parameter(torch.randn(1, side * side, channels))
        self.embed, self.embed_reference = nn.Linear(channels, dim), nn.Linear(channels, dim)
        self.layers = nn.ModuleList(PlainLayer(dim, fused) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, channels)
        self.register_buffer("inside", near((side, side), window))
        self.register_buffer("positions", sine_positions((side, side), dim))

    def forward(self, feature):
        tokens = F.avg_pool2d(feature, 3, 1, 1).flatten(2).transpose(1, 2)
        noisy = tokens + torch.randn_like(tokens) * tokens.norm(dim=2, keepdim=True) / tokens.shape[2] * 4
        x = self.embed(noisy) + self.positions
        r = (self.embed_reference(self.reference) + self.positions).expand(len(x), -1, -1)
        for layer in self.layers:
            x = layer(x, r, self.inside)
        found = self.head(self.norm(x))
        return F.mse_loss(found, tokens) + (1 - F.cosine_similarity(found, tokens, dim=2)).mean()


def seconds(run) -> tuple[float, float]:
    """Of one call: wall time, and processor time of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def medians(runs: dict[str, Any], rounds: int) -> dict[str, tuple[float, float]]:
    """Interleaved, after one call each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            measured = seconds(run)
            if number:
                taken[name].append(measured)
    return {name: tuple(statistics.median(x) for x in zip(*times, strict=True)) for name, times in taken.items()}


@pytest.mark.bench
def test_bench_rlr_step(capsys):
    torch.manual_seed(0)
    backbone = Backbone("tf_efficientnet_b6", [2, 3], "none", precision="32")
    images = torch.randn(BATCH, 3, 256, 256)
    features = backbone(images)
    ours: Any = RLR(backbone=backbone, optimizer=partial(torch.optim.Adam, lr=1e-4, fused=True), image_size=(256, 256))
    ours.features = lambda batch: features  # held in memory, as in training
    optimizer = ours.configure_optimizers()

    def step(precision):
        ours.precision = precision
        optimizer.zero_grad()
        ours.training_step({}, 0).backward()
        optimizer.step()

    def plain_step(fused):
        levels = [PlainLevel(72, 32, 7, 256, fused), PlainLevel(200, 16, 5, 512, fused)]
        adam = torch.optim.Adam([p for level in levels for p in level.parameters()], lr=1e-4)

        def run():
            with torch.no_grad():
                computed = backbone.net(images)
            adam.zero_grad()
            sum(level(x) for level, x in zip(levels, computed, strict=True)).backward()
            adam.step()

        return run

    def backbone_alone():
        with torch.no_grad():
            backbone.net(images)

    plain = {"plain": plain_step(False), "plain, fused attention": plain_step(True)}
    own = {"ours": partial(step, "auto"), "ours, float32": partial(step, "32")}
    times = medians({**own, **plain, "their backbone": backbone_alone}, ROUNDS)
    with capsys.disabled():
        print(f"\nRLR training step, EfficientNet-B6 shapes, batch {BATCH}, {torch.get_num_threads()} threads")
        print(f"{'':26}{'wall':>8}{'ratio':>8}{'processor':>12}{'ratio':>8}")
        for name, (wall, processor) in times.items():
            ratios = [seconds / ours for seconds, ours in zip((wall, processor), times["ours"], strict=True)]
            print(f"{name:26}{wall:8.2f}{ratios[0]:8.2f}{processor:12.2f}{ratios[1]:8.2f}")
        ours.precision = "auto"
        low = ours.low_precision(ours.device)
        print(f"ours computes its matrix products in {'bf16' if low else 'float32'}")
    fused = times["plain, fused attention"][1]
    assert fused >= 1.4 * times["ours, float32"][1]
    assert not low or fused >= 2 * times["ours"][1]  # with AVX512; AMX is faster


@pytest.mark.bench
def test_bench_local_window(capsys):
    """Forward and backward with keys and values that all images share: dense with a mask, gathered keys, tiles."""
    with capsys.disabled():
        print(f"\nlocal window, forward and backward, batch {BATCH}, processor time in ms")
        print(f"{'tokens, window, type':32}{'dense':>10}{'gathered':>10}{'tiles':>10}")
        for side, window, dim in ((16, 5, 512), (32, 7, 256), (64, 11, 128)):
            for dtype in (torch.float32, torch.bfloat16):
                forms = forms_of_the_window(side, window, dim, dtype)
                times = {name: 1000 * p for name, (_, p) in medians(forms, 3).items()}
                label = f"{side}², {window}, {str(dtype).removeprefix('torch.')}"
                print(f"{label:32}" + "".join(f"{times[name]:10.0f}" for name in forms))
                if side > 16:
                    assert times["tiles"] < 0.7 * min(times["dense"], times["gathered"])


def forms_of_the_window(side: int, window: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    heads, length = 8, side * side
    q = torch.randn(BATCH, heads, length, dim // heads, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, heads, length, dim // heads, dtype=dtype, requires_grad=True) for _ in range(2))
    mask, tiles = near((side, side), window), LocalWindow((side, side), window)
    offsets = torch.arange(window) - window // 2
    rows, columns = (torch.arange(side)[:, None] + offsets for _ in range(2))
    y = rows[:, None, :, None].expand(-1, side, -1, window).reshape(length, -1)
    x = columns[None, :, None, :].expand(side, -1, window, -1).reshape(length, -1)
    beyond = (y < 0) | (y >= side) | (x < 0) | (x >= side)
    index = y.clamp(0, side - 1) * side + x.clamp(0, side - 1)

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k.expand(BATCH, -1, -1, -1), v.expand(BATCH, -1, -1, -1), mask)

    def gathered(q, k, v):
        scores = torch.einsum("bhle,hlne->hlbn", q, k[0][:, index]) / math.sqrt(q.shape[-1])
        share = scores.masked_fill(beyond[:, None], -torch.inf).softmax(-1)
        return torch.einsum("hlbn,hlne->bhle", share, v[0][:, index])

    torch.testing.assert_close(tiles(q, k, v), dense(q, k, v), atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    return {
        name: lambda form=form: form(q, k, v).sum().backward()
        for name, form in (("dense", dense), ("gathered", gathered), ("tiles", tiles))
    }
