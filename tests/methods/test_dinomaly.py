"""Dinomaly, Dinomaly2 and INP-Former beside literal readings in float64, and StableAdamW beside its formula."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.dinomaly import Dinomaly, LinearAttention
from anomalib_lite.methods.inp_former import Extractor, GuidedBlock, INPFormer, coherence
from anomalib_lite.methods.schedules import warm_up_then_cosine
from anomalib_lite.methods.scoring import image_scores
from anomalib_lite.methods.stable_adamw import StableAdamW
from anomalib_lite.methods.vit_decoder import distance, means
from tests.helpers.kernels import Kernels, fake_gpu
from tests.helpers.run_programs import ROOT

DIM, GRID, TOKENS = 16, (2, 3), 5


class Encoder(nn.Module):
    """A stand-in for a ViT: the image's first numbers are its levels and tokens."""

    def __init__(self, count: int = 4, tokens: int = TOKENS):
        super().__init__()
        self.name, self.layers, self.tokens, self.class_token = "stand-in", list(range(count)), tokens, tokens > 0
        self.channels, self.reductions = [DIM] * count, [8] * count

    def forward(self, images):
        count, n = len(self.layers), GRID[0] * GRID[1] + self.tokens
        x = images.flatten(1)[:, : count * DIM * n].unflatten(1, (count, DIM, n)).unbind(1)
        maps = [level[..., self.tokens :].unflatten(-1, GRID) for level in x]
        return [*maps, *(level[..., None, : self.tokens] for level in x if self.tokens)]


def variants() -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "method" / "dinomaly.yaml"))
    return cfg["method"]["variants"]


def images(count: int = 3, seed: int = 0) -> dict[str, Any]:
    return {"image": torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def dinomaly(variant: str = "v1", **options: Any) -> Any:
    torch.manual_seed(0)
    mining = {"share": 0.9, "factor": 0.1, "warm_up": 1000}
    given: dict[str, Any] = {
        "variants": variants(),
        "variant": variant,
        "blocks": 4,
        "heads": 2,
        "precision": 32,
        "mining": mining,
    }
    model = Dinomaly(backbone=Encoder(), **given | options).double()
    scramble(model)
    return at_step(model, 500)


def inp_former(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"blocks": 4, "heads": 2, "precision": 32} | options
    model = INPFormer(backbone=Encoder(tokens=0), **options).double()
    scramble(model)
    return at_step(model, 500)


def scramble(model: nn.Module) -> None:
    """Larger weights than the initial ones, which give nearly the same output everywhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def at_step(model: Any, step: int) -> Any:
    model._trainer = SimpleNamespace(global_step=step)
    return model


# --- the schedule of mining and the gradients ---


@pytest.mark.parametrize(("step", "k"), [(0, 12544), (500, 6899), (1000, 1254), (5000, 1254)])
def test_k_and_threshold(step, k):
    """Of a batch of 16 at 28²: p is 0, 0.45, 0.9 and stays; int(n(1 − p)) of 12,544."""
    distances = torch.rand(16, 784, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ranked = sorted(distances.flatten().tolist(), reverse=True)
    factors = at_step(dinomaly(), step).gradient_scale(distances)
    assert torch.equal(factors == 0.1, distances < ranked[k - 1])


def unscaled_gradient(target: torch.Tensor, found: torch.Tensor, groups: int) -> torch.Tensor:
    """The derivative of mean over images of 1 − cos, divided by the groups, by its formula, without autograd."""
    gradient = torch.zeros_like(found)
    for i, (t, r) in enumerate(zip(target.flatten(1), found.flatten(1), strict=True)):
        dot, tn, rn = (t * r).sum(), t.norm(), r.norm()
        gradient[i] = (-(t / (tn * rn) - dot * r / (tn * rn**3)) / (groups * len(found))).view(found[i].shape)
    return gradient


@pytest.mark.parametrize("kind", ["v1", "v2", "inp_former"])
def test_gradient_scaling_against_brute_force(kind):
    """The gradient that reaches each fused map of the decoder, position by position."""
    model = inp_former() if kind == "inp_former" else dinomaly(kind)
    model.eval()  # no dropout
    pairs, _, further = model.pairs(images())
    wanted = []
    for target, found in pairs:
        d = torch.zeros(found.shape[:2], dtype=torch.float64)
        for i, j in torch.cartesian_prod(torch.arange(d.shape[0]), torch.arange(d.shape[1])).tolist():
            d[i, j] = 1 - target[i, j] @ found[i, j] / (target[i, j].norm() * found[i, j].norm())
        gradient = unscaled_gradient(target, found.detach(), len(pairs))
        if kind == "inp_former":
            factor = (d / d.mean()) ** 3
        else:
            last = sorted(d.flatten().tolist(), reverse=True)[int(d.numel() * (1 - 0.45)) - 1]
            factor = torch.ones_like(d).masked_fill(d < last, 0.1)
            assert factor.min() == 0.1
        wanted.append(gradient * factor[..., None])
    seen: list[torch.Tensor] = []
    model.pairs = lambda batch: (pairs, GRID, further)
    loss = model.training_step(images(), 0)
    for _, found in pairs:  # behind the hooks of the training step, so with scaled gradients
        found.register_hook(seen.append)
    literal = sum((1 - F.cosine_similarity(t.flatten(1), r.flatten(1))).mean() for t, r in pairs) / 2 + further
    torch.testing.assert_close(loss, literal)
    loss.backward()
    for a, b in zip(sorted(seen, key=float_of), sorted(wanted, key=float_of), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-12, rtol=1e-9)


def test_a_power_that_is_no_whole_number():
    """A distance that rounding makes slightly negative has no such power."""
    factors = inp_former(power=2.5).gradient_scale(torch.tensor([[-2e-7, 0.1, 0.3]]))
    torch.testing.assert_close(factors, (torch.tensor([[0, 0.1, 0.3]]) / (0.4 / 3)) ** 2.5)


def float_of(x: torch.Tensor) -> float:
    return x.flatten()[0].item()


# --- the networks ---


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
def test_linear_attention_against_its_kernel(eps):
    """The N × N matrix of (elu(q) + 1) · (elu(k) + 1), its rows divided by their sums."""
    torch.manual_seed(0)
    attention = LinearAttention(DIM, 2, eps).double()
    scramble(attention)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    q, k, v = F.linear(x, attention.qkv.weight, attention.qkv.bias).split(DIM, -1)
    out = torch.zeros_like(x)
    for image in range(2):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            kernel = (F.elu(q[image][:, part]) + 1) @ (F.elu(k[image][:, part]) + 1).T
            out[image][:, part] = kernel / (kernel.sum(1, keepdim=True) + eps) @ v[image][:, part]
    torch.testing.assert_close(attention(x), F.linear(out, attention.project.weight, attention.project.bias))


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_bottleneck_pairs_and_map(variant):
    """Without fused maps: the mean of all levels goes in, and single outputs are paired with single levels."""
    model = dinomaly(variant).eval()
    own, batch = variants()[variant], images()
    levels = model.backbone(batch["image"])
    whole = [torch.cat([t[:, :, 0], x.flatten(2)], 2).mT for x, t in zip(levels[:4], levels[4:], strict=True)]
    x = torch.stack(whole).mean(0)
    layers = [part for part in model.bottleneck if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in layers] == (
        [(16, 64), (64, 16)] if variant == "v1" else [(16, 256), (256, 64), (64, 16)]
    )
    for part in layers[:-2]:
        x = part(x)
    x = layers[-1](F.gelu(layers[-2](x)))
    outputs = []
    for block in model.decoder:
        x = x + block.attention(F.layer_norm(x, (DIM,), block.norm1.weight, block.norm1.bias, 1e-8))
        hidden = F.layer_norm(x, (DIM,), block.norm2.weight, block.norm2.bias, 1e-8)
        x = x + block.mlp[-1](F.gelu(block.mlp[0](hidden)))
        outputs.append(x)
    maps = []
    pairs, grid, _ = model.pairs(batch)
    for group, (target, found) in enumerate(pairs):
        first, second = 2 * group, 2 * group + 1
        decoder = (outputs[3 - first] + outputs[3 - second]) / 2  # the last block is paired with the first level
        encoder = (whole[first] + whole[second]) / 2
        wanted = encoder[:, TOKENS:]
        if own["recentre"]:
            wanted = wanted - encoder[:, :1]
            wanted = (wanted - wanted.mean(-1, keepdim=True)) / (
                wanted.var(-1, unbiased=False, keepdim=True) + 1e-8
            ).sqrt()
        torch.testing.assert_close(target, wanted)
        torch.testing.assert_close(found, decoder[:, TOKENS:])
        maps.append((1 - F.cosine_similarity(wanted, decoder[:, TOKENS:], dim=-1)).unflatten(1, grid))
    up = [F.interpolate(x[:, None], (16, 24), mode="bilinear", align_corners=True)[:, 0] for x in maps]
    torch.testing.assert_close(model.anomaly_map(batch), (up[0] + up[1]) / 2)
    expected = sum(1 - F.cosine_similarity(t.flatten(1), r.flatten(1)) for t, r in pairs) / 2
    torch.testing.assert_close(model.held_out_loss(batch), expected)


def test_recentring_ignores_what_all_tokens_share():
    """A vector added to the class token and the patches of an image moves no target of Dinomaly2."""
    model = dinomaly("v2")
    patches, prefix = torch.randn(2, 6, DIM, dtype=torch.float64), torch.randn(2, 5, DIM, dtype=torch.float64)
    shift = 10 * torch.randn(2, 1, DIM, dtype=torch.float64)
    [plain], [shifted] = model.targets([patches], [prefix]), model.targets([patches + shift], [prefix + shift])
    torch.testing.assert_close(plain, shifted)
    [moved] = model.targets([patches + shift], [prefix])
    assert not torch.allclose(plain, moved)
    assert dinomaly("v1").targets([patches], [prefix]) == [patches]


def test_inp_formers_networks():
    torch.manual_seed(0)
    extractor, block = Extractor(DIM, 2, 3).double(), GuidedBlock(DIM, 2).double()
    scramble(extractor)
    scramble(block)
    x = torch.randn(2, 6, DIM, dtype=torch.float64)

    def normed(part: Any, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, (DIM,), part.weight, part.bias, 1e-8)

    def feed(part: Any, y: torch.Tensor) -> torch.Tensor:
        return part.mlp[-1](F.gelu(part.mlp[0](normed(part.norm2, y))))

    def attended(part: Any, queries: torch.Tensor, read: torch.Tensor, weigh: Any) -> torch.Tensor:
        q, k, v = part.query(queries), part.key(read), part.value(read)
        heads = [slice(0, 8), slice(8, 16)]
        return part.project(torch.cat([weigh(q[:, h], k[:, h], i) @ v[:, h] for i, h in enumerate(heads)], 1))

    prototypes, out = extractor(x), block(x, extractor(x))
    for image in range(2):
        tokens, read = extractor.tokens.detach(), normed(extractor.norm1, x[image])
        added = attended(
            extractor, normed(extractor.norm1, tokens), read, lambda q, k, _: (q @ k.T / math.sqrt(8)).softmax(1)
        )
        tokens = tokens + added
        tokens = tokens + feed(extractor, tokens)
        torch.testing.assert_close(prototypes[image], tokens)

        def relu(q: torch.Tensor, k: torch.Tensor, head: int) -> torch.Tensor:
            cosines = q / q.norm(dim=1, keepdim=True) @ (k / k.norm(dim=1, keepdim=True)).T
            return (cosines * block.scale[head, 0, 0]).clamp(min=0)

        y = attended(block, normed(block.norm1, x[image]), normed(block.norm1, tokens), relu)  # no residual
        torch.testing.assert_close(out[image], y + feed(block, y))
    nearest = [
        min(float(1 - F.cosine_similarity(x[i, j].detach(), p, dim=0)) for p in prototypes[i].detach())
        for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist()
    ]
    assert coherence(x, prototypes).item() == pytest.approx(sum(nearest) / 12)
    model = inp_former(coherence=0.7)
    tokens = means([level.flatten(2).mT for level in model.backbone(images()["image"])], 1)[0]
    weighted = model.pairs(images())[2]
    torch.testing.assert_close(weighted, 0.7 * coherence(tokens, model.extractor(tokens)))


def test_initial_weights():
    model = Dinomaly(variants(), backbone=Encoder())
    for other in (model, INPFormer(backbone=Encoder(tokens=0))):
        layers = [part for part in other.modules() if isinstance(part, nn.Linear)]
        weights = torch.cat([part.weight.detach().flatten() for part in layers])
        assert 0.0097 < float(weights.std()) < 0.01  # a normal of 0.01, cut at three deviations, has 0.00987
        assert float(weights.abs().max()) <= 0.03
        assert not any(part.bias.any() for part in layers)
    assert len(model.decoder) == 8


# --- optimiser, schedule, score ---


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_stable_adamw_against_its_formula(amsgrad, size):
    """Three steps; where the gradient grows a thousandfold, r exceeds 1 and limits the update."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = StableAdamW([p], 2e-3, (0.9, 0.999), 1e-10, 1e-4, amsgrad)
    m = v = largest = torch.zeros_like(p)
    expected, limits = p.detach().clone(), []
    for t, scale in enumerate((1.0, 1000 * size, 0.5), 1):
        g = torch.randn(5, 3, dtype=torch.float64) * scale
        p.grad = g.clone()
        optimizer.step()
        expected = expected * (1 - 2e-3 * 1e-4)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        largest = torch.maximum(largest, v) if amsgrad else v
        den = largest.sqrt() / math.sqrt(1 - 0.999**t) + 1e-10
        limits.append(max(1.0, math.sqrt(((g / den) ** 2).mean())))
        expected = expected - 2e-3 / (1 - 0.9**t) / limits[-1] * m / den
        torch.testing.assert_close(p.detach(), expected, atol=1e-12, rtol=1e-12)
    assert (max(limits) > 1.2) == (size == 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_bad_gradients_changes_nothing(bad):
    """Afterwards everything is as if that batch had not been; without `skip` the weights are lost."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 3), torch.randn(3, 2, 3)
    ends = {}
    for skip, given in ((True, [0, None, 1]), (True, [0, 1]), (False, [0, 1]), (False, [0, None, 1])):
        p, other = nn.Parameter(start.clone()), nn.Parameter(torch.ones(3))
        optimizer = StableAdamW([{"params": [p]}, {"params": [other], "lr": 1e-3}], 1e-2, skip=skip)
        for number in given:
            p.grad = gradients[number].clone() if number is not None else torch.full((2, 3), bad)
            other.grad = torch.ones(3)
            optimizer.step()
        ends[skip, len(given)] = torch.cat([p.detach().flatten(), other.detach()])
    torch.testing.assert_close(ends[True, 3], ends[True, 2], atol=0, rtol=0)
    torch.testing.assert_close(ends[True, 2], ends[False, 2])
    assert ends[False, 3].isnan().any()


@pytest.mark.parametrize(("skip", "each"), [(False, 2), (True, 4)])
def test_a_step_launches_few_kernels(skip, each):
    """Most are for all tensors together; no step waits for the device."""
    with fake_gpu(), Kernels() as kernels:
        parameters = [nn.Parameter(torch.ones(2, 3, device="cuda")) for _ in range(50)]
        for p in parameters:
            p.grad = torch.ones(2, 3, device="cuda")
        optimizer = StableAdamW(parameters, 2e-3, amsgrad=True, skip=skip)
        optimizer.step()  # makes the state
        kernels.launched.clear()
        optimizer.step()
    assert not kernels.waits
    assert sum(kernels.launched.values()) <= 50 * each + 40, kernels.launched


def test_learning_rates():
    """linspace(0, 2e-3, 100), then half a cosine from 2e-3 to 2e-4 at the end of T = 10,000 steps."""
    model = dinomaly(optimizer=lambda groups, **more: StableAdamW(groups, 2e-3, **more), steps=10000)
    made = model.configure_optimizers()
    [rate] = made["lr_scheduler"]["scheduler"].lr_lambdas
    found = {i: 2e-3 * rate(i) for i in (0, 1, 99, 100, 5050, 9999)}
    last = 2e-4 + 0.5 * 1.8e-3 * (1 + math.cos(math.pi * 9899 / 9900))
    assert found == pytest.approx({0: 0, 1: 2e-3 / 99, 99: 2e-3, 100: 2e-3, 5050: 1.1e-3, 9999: last}, abs=1e-15)
    assert made["optimizer"].param_groups[0]["amsgrad"]
    second = dinomaly("v2", optimizer=lambda groups, **more: StableAdamW(groups, 2e-3, **more), steps=40000)
    groups = second.configure_optimizers()["optimizer"].param_groups
    assert [(group["initial_lr"], group["skip"], group["amsgrad"]) for group in groups] == [
        (2e-3, True, False), (2e-4, True, False),
    ]  # fmt: skip
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in second.bottleneck[0].parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(second.parameters()))
    second.scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=5)
    groups = second.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == [2e-3, 2e-4]
    assert [warm_up_then_cosine(i, 40000, 100, 1.0) for i in (99, 100, 39999)] == [1, 1, 1]


def test_options_without_effect():
    """What another variant, the variant's optimizer, its missing layer, or a scheduler replaces."""
    expected = {
        "variants.v2": "method.variant=v1",
        "optimizer.amsgrad": "method.variants.v1.optimizer.amsgrad=true",
        "variants.v1.first_lr": "method.variants.v1.narrow=null",
    }
    assert dinomaly().without_effect() == expected
    rates = dict.fromkeys(("warm_up", "final"), "method.scheduler")
    assert inp_former().without_effect() == {}
    assert inp_former(scheduler=object).without_effect() == rates
    expected |= rates | {"variants.v1.final": "method.scheduler"}
    assert dinomaly(scheduler=object).without_effect() == expected
    assert "variants.v2.first_lr" not in dinomaly("v2").without_effect()


def test_another_optimizer_than_the_configured_one():
    """It gets no option that AdamW does not have. The configuration has all options that stored runs have."""
    assert variants()["v1"]["optimizer"] == {"amsgrad": True, "skip": False}
    [group] = dinomaly(optimizer=torch.optim.AdamW).configure_optimizers()["optimizer"].param_groups
    assert group["amsgrad"]


def test_the_image_score_is_the_mean_of_655_pixels():
    maps = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [sum(sorted(each.flatten().tolist(), reverse=True)[:655]) / 655 for each in maps]
    assert image_scores(maps, 0.01).tolist() == pytest.approx(expected, rel=1e-12)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"method\.groups=3: 4 levels .* not divisible by it; give 1 or 2 or 4, and a multiple"),
        ({"blocks": 5}, r"method\.groups=2: 4 levels .* and 5 decoder blocks"),
        ({"heads": 3}, r"method\.heads=3: the 16 channels are not divisible"),
        ({"variant": "v3"}, r"method\.variant=v3: choose v1 or v2"),
        ({"mining": {"share": 1.0, "factor": 0.1, "warm_up": 1000}}, r"method\.mining=.*give null, or a share"),
        ({"clip": 0.0}, r"method\.clip=0\.0: give a norm above 0, or null"),
        ({"variant": "v2", "backbone": Encoder(tokens=0)}, r"variants\.v2\.recentre=true: .* stand-in has none"),
    ],
)
def test_options_that_do_not_fit(options, message):
    given = {"variants": variants(), "backbone": Encoder()} | options
    with pytest.raises(UserError, match=message) as error:
        Dinomaly(**given)
    assert "\n" not in str(error.value)


def test_levels_of_different_shapes():
    encoder = Encoder(2, 0)
    encoder.channels, encoder.reductions = [8, 16], [4, 8]
    with pytest.raises(UserError, match=r"method\.groups=2: the levels of stand-in have different shapes.*groups=1"):
        INPFormer(backbone=encoder)
    model = INPFormer(groups=1, backbone=encoder)
    fine, coarse = torch.randn(2, 8, 4, 6), torch.randn(2, 16, 2, 3)
    [joined] = model.kept([fine, coarse])
    torch.testing.assert_close(joined, torch.cat([F.avg_pool2d(fine, 2), coarse], 1))
    assert (model.dim, model.keeps) == (24, "joined")
    assert distance(joined.flatten(2).mT, joined.flatten(2).mT).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["v1", "inp_former"])
def test_bf16_leaves_map_and_loss_in_float32(kind):
    """Also where everything runs under autocast: distances near 0 are differences of nearly equal numbers."""
    model = inp_former(precision="bf16") if kind == "inp_former" else dinomaly(kind, precision="bf16")
    model, batch = model.float().eval(), {"image": images()["image"].float()}
    with torch.autocast("cpu", torch.bfloat16):
        low, loss = model.anomaly_map(batch), model.training_step(batch, 0)
    assert (low.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert not torch.equal(low, low.bfloat16().float())
    model.precision = "32"
    torch.testing.assert_close(low, model.anomaly_map(batch), atol=0.05, rtol=0)
