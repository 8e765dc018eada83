"""A training step of Dinomaly from cached fused maps, beside a literal one that computes the encoder anew."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.attention import Dropout
from anomalib_lite.methods.dinomaly import Dinomaly
from anomalib_lite.methods.stable_adamw import StableAdamW
from tests.benchmarks.bench_training import seconds
from tests.methods.test_dinomaly import variants

NAME, SIDE, BATCH, ROUNDS, STEP = "vit_small_patch14_dinov2", 392, 4, 3, 500


def make() -> Any:
    torch.manual_seed(0)
    backbone = Backbone(NAME, list(range(2, 10)), "none", "32", [(SIDE, SIDE)], tokens=True)
    mining = {"share": 0.9, "factor": 0.1, "warm_up": 1000}
    model: Any = Dinomaly(variants(), mining=mining, backbone=backbone, precision=32)
    model._trainer = SimpleNamespace(global_step=STEP)
    return model


def optimised(model: Any, loss_of: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = StableAdamW(parameters, 2e-3, eps=1e-10, weight_decay=1e-4, amsgrad=True)

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        return float(loss.detach())

    return step


def literal_loss(model: Any, images: torch.Tensor) -> torch.Tensor:
    """All blocks up to the last target, the mean of their eight outputs, PyTorch's dropout, and the decoder."""
    net = model.backbone.net.model
    with torch.no_grad():
        x, outputs = net.norm_pre(net._pos_embed(net.patch_embed(images))), []
        for number, block in enumerate(net.blocks):
            x = block(x)
            if number >= 2:
                outputs.append(x)
    x, found = model.bottleneck(torch.stack(outputs, 1).mean(1)), []
    for block in model.decoder:
        q, k, v = block.attention.qkv(block.norm1(x)).unflatten(-1, (3, model.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        x = x + block.attention.project(((q @ (k.mT @ v)) * z).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        found.append(x)
    loss, first = torch.zeros(()), net.num_prefix_tokens
    for group in (slice(0, 4), slice(4, 8)):
        target = torch.stack(outputs[group], 1).mean(1)[:, first:].mT
        r = torch.stack(found[::-1][group], 1).mean(1)[:, first:].mT.contiguous()
        d = 1 - F.cosine_similarity(target, r).detach()
        easy = d < d.flatten().topk(int(d.numel() * (1 - 0.9 * STEP / 1000))).values[-1]
        r.register_hook(lambda grad, easy=easy: grad * torch.where(easy, 0.1, 1.0)[:, None])
        loss = loss + (1 - F.cosine_similarity(target.flatten(1), r.flatten(1))).mean() / 2
    return loss


@pytest.mark.bench
def test_bench_step(capsys):
    ours, images = make(), torch.randn(BATCH, 3, SIDE, SIDE)
    levels = ours.kept(ours.backbone(images))
    batch = {"features": [level.movedim(1, -1).contiguous() for level in levels]}  # as the loader gives them
    ours.eval()
    assert ours.training_step(batch, 0).item() == pytest.approx(literal_loss(ours, images).item(), rel=1e-5)
    ours.train()
    plain = copy.deepcopy(ours)
    for parent in list(plain.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, Dropout):
                setattr(parent, name, nn.Dropout(part.p))
    steps = {
        "cached fused maps": optimised(ours, lambda: ours.training_step(batch, 0)),
        "literal": optimised(plain, lambda: literal_loss(plain, images)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            times[name].append(seconds(step)[1])
    best = {name: min(each[1:]) for name, each in times.items()}
    ratio = best["literal"] / best["cached fused maps"]
    with capsys.disabled():
        print(f"\nDinomaly, {NAME}, {SIDE}², batch {BATCH}, processor time a step ({torch.get_num_threads()} threads)")
        for name, taken in best.items():
            print(f"  {name:20}{taken:8.2f} s")
        print(f"  literal / cached: {ratio:.2f}")
    assert ratio >= 1.4
