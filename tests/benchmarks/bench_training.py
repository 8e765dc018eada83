"""Seconds a training step of ReContrast beside a plain version of it, and what our training loop adds to a step."""

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from anomalib_lite.features.backbones import Backbone, has_bf16
from anomalib_lite.features.precompute import smallest_type
from anomalib_lite.methods.norm_occ import NormOCC
from anomalib_lite.methods.patches import projection
from anomalib_lite.methods.recontrast import ReContrast
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.methods import test_recontrast

ROUNDS = 4


def seconds(step) -> tuple[float, float]:
    """Wall and processor time of a step; what else the machine does stretches the first."""
    start = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def make_ours(name: str) -> ReContrast:
    """As the configuration has it: channels last, bf16 where the machine has it, fused AdamW."""
    torch.manual_seed(0)
    model = ReContrast(
        test_recontrast.variants(),
        backbone=Backbone(name, [1, 2, 3], "none"),
        optimizer=lambda groups, **more: torch.optim.AdamW(groups, lr=2e-3, weight_decay=1e-5, fused=True, **more),
        scoring={"pixel_smooth": "auto", "image_score": "auto"},
    )
    model.steps = 100
    return test_recontrast.at_step(model, 50)


def our_step(model: ReContrast, images: torch.Tensor):
    optimizer, batch = model.configure_optimizers(), test_recontrast.batch_of(images)
    levels = model.features(batch)  # of E_f: the cache gives them in training
    batch["features"] = [level.movedim(1, -1).to(smallest_type(levels)) for level in levels]

    def step():
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def plain_step(model: ReContrast, images: torch.Tensor, block):
    """The literal reading in float32 and NCHW, with PyTorch's batch norm, a hook for mining, and two AdamW."""
    model.to(memory_format=torch.contiguous_format)
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    rest = [p for part in (model.bottleneck, model.decoder, model.heads) for p in part.parameters()]
    optimizers = [torch.optim.AdamW(rest, 2e-3, weight_decay=1e-5), torch.optim.AdamW(encoder, 1e-5, weight_decay=1e-5)]

    def step():
        loss = torch.zeros(())
        for target, r in test_recontrast.literal_pairs(model, images, torch.relu, block):
            with torch.no_grad():
                m = 1 - F.cosine_similarity(target, r)
                easy = m < m.mean() + m.std()
            r.register_hook(lambda grad, easy=easy: grad * (~easy)[:, None])
            loss = loss + (1 - F.cosine_similarity(target.flatten(1), r.flatten(1))).mean() / 2
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    return step


@pytest.mark.bench
@pytest.mark.parametrize(("name", "batch", "block"), [
    ("resnet18", 16, test_recontrast.basic), ("wide_resnet50_2", 4, test_recontrast.bottleneck_block),
])  # fmt: skip
def test_bench_recontrast_step(capsys, monkeypatch, name, batch, block):
    monkeypatch.setattr(
        test_recontrast, "norm", lambda x, layer: F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    )
    images = torch.randn(batch, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    model = make_ours(name)
    steps = {"ours": our_step(model, images), "plain": plain_step(copy.deepcopy(model), images, block)}
    first = {kind: step() for kind, step in steps.items()}  # also a warm-up
    every = torch.get_num_threads()
    with capsys.disabled():
        low = "bf16" if model.backbone.low_precision(torch.device("cpu")) else "float32"  # type: ignore[union-attr]
        print(f"\nReContrast, {name}, batch {batch}, 256², random weights, {low}")
        print(f"  the first batch's loss {first['ours']:.4f}, plain {first['plain']:.4f}")
        walls: dict[str, list[float]] = {kind: [] for kind in steps}
        for threads in dict.fromkeys((every, 1)):
            torch.set_num_threads(threads)
            rounds = [{kind: seconds(step) for kind, step in steps.items()} for _ in range(ROUNDS)]  # turn about
            for i, clock in enumerate(("wall", "processor")):
                best = {kind: min(row[kind][i] for row in rounds) for kind in steps}
                print(f"  {threads} threads, {clock:9} time at best: {listed(best)}")
                for kind in steps if clock == "wall" else ():
                    walls[kind].append(best[kind])
        fastest = {kind: min(times) for kind, times in walls.items()}
        print(f"  each with its better number of threads, wall time: {listed(fastest)}")
    torch.set_num_threads(every)
    assert first["ours"] == pytest.approx(first["plain"], rel=0.02)
    assert fastest["plain"] >= 2 * fastest["ours"]


def listed(times: dict[str, float]) -> str:
    ratio = times["plain"] / times["ours"]
    return f"ours {times['ours']:6.2f} s, plain {times['plain']:6.2f} s a step, {ratio:.2f} times faster"


class Timed(NormOCC):
    """norm_occ that notes when its steps begin."""

    begun: list[float] = []  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        self.begun.append(time.process_time())
        return super().training_step(batch, batch_idx)


def our_loop(arguments: list[str], run: Path) -> float:
    Timed.begun.clear()
    outcome = runs.train(*arguments, f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    return statistics.median(b - a for a, b in zip(Timed.begun, Timed.begun[1:], strict=False))


def bare_loop(levels: list[torch.Tensor], batch: int, steps: int) -> float:
    """norm_occ's step on the same features, in tensors."""
    channels = sum(level.shape[1] for level in levels)
    project = torch.nn.Conv2d(channels, channels, 1, bias=False)
    goal, low = torch.randn(channels), has_bf16(torch.device("cpu"))
    optimizer = torch.optim.AdamW(project.parameters(), 1e-4, weight_decay=1e-5, fused=True)
    times = []
    for _ in range(steps):
        rows = torch.randint(len(levels[0]), (batch,))

        def step(rows=rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                z = projection(project.weight, [level[rows] for level in levels], goal)
            loss = torch.linalg.vector_norm(z, dtype=torch.float32) ** 2 / z[:, 0].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        times.append(seconds(step)[1])
    return statistics.median(times)


@pytest.mark.bench
def test_bench_training_loop(capsys, tmp_path):
    steps, batch, side = 150, 8, 256
    make_mvtec(tmp_path / "data", train=32, good=1, defects={"broken": 1}, size=side)
    arguments: Any = [
        "method=norm_occ", f"method._target_={__name__}.Timed", *runs.folder_data(tmp_path / "data"),
        f"data.image_size={side}", f"data.batch_size={batch}", "trainer.max_epochs=null", f"trainer.max_steps={steps}",
        "hardware.threads=1",
    ]  # fmt: skip
    torch.set_num_threads(1)
    backbone = Backbone("resnet18.tv_in1k", [2, 3], "none")
    images = torch.randn(32, 3, side, side, generator=torch.Generator().manual_seed(0))
    levels = [level.contiguous(memory_format=torch.channels_last) for level in backbone(images)]
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for i in range(3):
        times["ours"].append(our_loop(arguments, tmp_path / f"run{i}"))
        times["bare"].append(bare_loop(levels, batch, steps))
    ours, bare = min(times["ours"]), min(times["bare"])
    with capsys.disabled():
        print(f"\nnorm_occ, resnet18, layers 2 and 3, batch {batch}, {side}², {torch.get_num_threads()} threads")
        print(f"  our loop {1000 * ours:.1f} ms of processor time a step, bare PyTorch {1000 * bare:.1f} ms", end="")
        print(f": {ours / bare - 1:+.1%}")
    assert ours <= 1.15 * bare
