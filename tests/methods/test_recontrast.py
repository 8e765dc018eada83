"""ReContrast against a literal reading of its specification in float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import ndimage
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone, has_bf16
from anomalib_lite.methods.batch_norm import StableNorm, synchronise
from anomalib_lite.methods.recontrast import ReContrast, cosine_loss
from anomalib_lite.methods.reverse_distillation import Bottleneck, Decoder, blocks_of
from tests.helpers import run_programs as runs
from tests.helpers.ranks import PROCESSES

TINY = "mobilenetv3_small_050"
CONFIG = yaml.safe_load((runs.ROOT / "conf" / "method" / "recontrast.yaml").read_text())


def adamw(groups, **options):
    return torch.optim.AdamW(groups, lr=2e-3, **options)


def variants() -> dict[str, Any]:
    """Those of the configuration; YAML 1.1 takes 1e-10 for a word."""

    def numbers(x):
        if isinstance(x, dict):
            return {key: numbers(value) for key, value in x.items()}
        return float(x) if isinstance(x, str) and x[0].isdigit() else x

    return numbers(CONFIG["method"]["variants"])


def make(name=TINY, size=32, scoring=None, **options: Any) -> ReContrast:
    torch.manual_seed(0)
    backbone = Backbone(name, [1, 2, 3], "none", "32")
    for module in backbone.modules():  # statistics and weights that are no identity
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm begins with 0 at the end of each residual branch
    context = {"scoring": {"pixel_smooth": "auto", "image_score": "auto"} | (scoring or {}), "precision": "32"}
    model = ReContrast(variants(), backbone=backbone, image_size=(size, size), optimizer=adamw, **context | options)
    model.steps = 100
    return model


def at_step(model: ReContrast, step: int) -> ReContrast:
    model.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step, strategy=SimpleNamespace(lightning_module=model)
    )
    return model


# --- the specification, read literally ---


def norm(x, layer):
    """Batch norm by the batch's statistics, as while training."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def conv_norm(x, part, stride=1):
    weight = part[0].weight
    return norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), part[1])


def up_norm(x, part):
    return norm(F.conv_transpose2d(x, part[0].weight, stride=2), part[1])


def basic(x, block, change, act):
    first, _, second = block.body
    short = x
    if change == "down":
        y, short = conv_norm(x, first, 2), conv_norm(x, block.shortcut, 2)
    elif change == "up":
        y, short = up_norm(x, first), up_norm(x, block.shortcut)
    else:
        y = conv_norm(x, first)
    return act(conv_norm(act(y), second) + short)


def bottleneck_block(x, block, change, act):
    first, _, middle, _, last = block.body
    y, short = act(conv_norm(x, first)), x
    if change == "down":
        y, short = conv_norm(y, middle, 2), conv_norm(x, block.shortcut, 2)
    elif change == "up":
        y, short = up_norm(y, middle), up_norm(x, block.shortcut)
    else:
        y = conv_norm(y, middle)
    return act(conv_norm(act(y), last) + short)


def literal_bottleneck(levels, net, block):
    one = torch.relu(conv_norm(levels[0], net.first[0], 2))
    one = torch.relu(conv_norm(one, net.first[2], 2))
    two = torch.relu(conv_norm(levels[1], net.second[0], 2))
    x = torch.cat([one, two, levels[2]], 1)
    for i, part in enumerate(net.blocks):
        x = block(x, part, "" if i else "down", torch.relu)
    return x


def literal_decoder(x, net, block, act):
    levels = []
    for stage in net.stages:
        for i, part in enumerate(stage):
            x = block(x, part, "" if i else "up", act)
        levels.append(x)
    return levels[::-1]


def literal_pairs(model, images, act, block=basic):
    trained = model.encoder.net(images)
    with torch.no_grad():
        frozen = model.backbone.net(images)
    u = [torch.cat([t, f]) for t, f in zip(trained, frozen, strict=True)]
    decoded = literal_decoder(literal_bottleneck(u, model.bottleneck, block), model.decoder, block, act)
    half = len(images)
    pairs = []
    for k in range(3):
        head = model.heads[0][k]
        pairs.append((frozen[k], F.conv2d(decoded[k][:half], head.weight, head.bias)))
    for k in range(3):
        head = model.heads[1][k]
        pairs.append((trained[k].detach(), F.conv2d(decoded[k][half:], head.weight, head.bias)))
    return pairs


def literal_loss(pairs, alpha):
    """Global cosines; a hook cuts the gradient at easy positions."""
    total = 0.0
    for target, reconstruction in pairs:
        with torch.no_grad():
            dot = (target * reconstruction).sum(1)
            m = 1 - dot / (target.norm(dim=1) * reconstruction.norm(dim=1))
            easy = m < m.mean() + alpha * m.std()
        reconstruction.register_hook(lambda grad, easy=easy: grad * (~easy)[:, None])
        t, r = target.flatten(1), reconstruction.flatten(1)
        total = total + (1 - (t * r).sum(1) / (t.norm(dim=1) * r.norm(dim=1))).mean() / 2
    return total


def images_of(count=3, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch_of(images):
    return {"image": images, "path": [str(i) for i in range(len(images))]}


@pytest.mark.parametrize(("variant", "encoder_bn", "step"), [
    ("one_class", "eval", 5), ("one_class", "train", 50), ("unified", "eval", 0), ("unified", "eval", 50),
])  # fmt: skip
def test_pairs_loss_and_gradients(variant, encoder_bn, step):
    """At α = −3, −1 and 1: nothing is easy, a little, and most."""
    model = at_step(make(size=64, variant=variant, encoder_bn=encoder_bn).double(), step)
    images, act = images_of(), F.gelu if variant == "unified" else torch.relu
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = literal_pairs(model, images, act)
    loss = literal_loss(expected, min(-3 + 4 * step / 10, 1))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    model.load_state_dict(before, strict=False)  # the encoder's statistics have moved
    found = model.pairs(batch_of(images))
    for (target, reconstruction), (t, r) in zip(found, expected, strict=True):
        torch.testing.assert_close(target, t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(reconstruction, r, rtol=1e-9, atol=1e-9)
        assert not target.requires_grad
    model.load_state_dict(before, strict=False)
    ours = model.training_step(batch_of(images), 0)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    scale = max(float(g.abs().max()) for g in gradients)
    for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-7, atol=1e-10 * scale, msg=name)
    assert all(p.grad is None for p in model.backbone.parameters())  # type: ignore[union-attr]


def test_mining_cuts_gradients_where_it_should_and_nothing_else():
    t, r = images_of(2, 8), images_of(4, 8)[2:].requires_grad_()
    m = 1 - F.cosine_similarity(t, r)
    threshold = m.mean() + 0.3 * m.std()
    (full,) = torch.autograd.grad(cosine_loss(t, r, None), r)
    (mined,) = torch.autograd.grad(cosine_loss(t, r, 0.3), r)
    easy = (m < threshold)[:, None].expand_as(full)
    assert 0.3 < easy.double().mean() < 0.9
    assert (mined[easy] == 0).all()
    torch.testing.assert_close(mined[~easy], full[~easy], rtol=1e-12, atol=0)
    assert torch.equal(cosine_loss(t, r, None), cosine_loss(t, r, 0.3))


def test_a_reconstruction_of_zeros_has_a_finite_gradient():
    """As of a decoder whose last ReLU has died; the root of its norm has none."""
    zeros = torch.zeros(1, 2, 3, 4, 4, requires_grad=True)
    loss = cosine_loss(torch.randn(1, 2, 3, 4, 4), zeros, 0.3).sum()
    loss.backward()
    assert loss == 1
    assert torch.isfinite(zeros.grad).all()  # type: ignore[arg-type]


def test_alpha():
    model = make()  # 100 batches, warm-up 10 %
    assert [model.alpha(step) for step in (0, 5, 10, 11, 99)] == pytest.approx([-3, -1, 1, 1, 1])
    stable = make(variant="stable")
    assert [stable.alpha(step) for step in (0, 10, 20, 99)] == pytest.approx([-3, -1, 1, 1])
    falling = make(mining=[1, -3])
    assert [falling.alpha(step) for step in (0, 5, 10, 99)] == pytest.approx([1, -1, -3, -3])
    assert make(mining=None).alpha(7) is None


def test_the_encoder_learns_only_through_its_own_half():
    """With the decoder's batch norm in evaluation mode the halves do not meet."""
    model = make(size=64).double().eval()
    weights = [p for p in model.encoder.parameters() if p.requires_grad]

    def added(pairs):
        return torch.stack([cosine_loss(target, r, None) for target, r in pairs]).sum()

    own, others = model.pairs(batch_of(images_of()))[:3], model.pairs(batch_of(images_of()))[3:]
    through = torch.autograd.grad(added(own), weights, allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in through)
    around = torch.autograd.grad(added(others), weights, allow_unused=True)
    assert all(g is None or not g.any() for g in around)


@pytest.mark.parametrize("variant", ["one_class", "unified"])
def test_map_and_scores(variant):
    model = make(size=64, variant=variant).double().eval()
    images = images_of()
    with torch.no_grad():
        found = model.score(batch_of(images))
        pairs = model.pairs(batch_of(images))
    total = np.zeros((3, 64, 64))
    for target, reconstruction in pairs:
        t, r = target.numpy(), reconstruction.numpy()
        cos = (t * r).sum(1) / np.sqrt((t * t).sum(1) * (r * r).sum(1))
        side = cos.shape[-1]
        at = np.arange(64) * (side - 1) / 63  # corners on corners
        grid = np.meshgrid(at, at, indexing="ij")
        total += np.stack([ndimage.map_coordinates(1 - c, grid, order=1, mode="nearest") for c in cos])
    if variant == "unified":
        x = np.arange(-2, 3)
        taps = np.exp(-(x**2) / (2 * 4**2))
        smooth = ndimage.convolve(total / 6, (taps[:, None] * taps / taps.sum() ** 2)[None], mode="reflect")
        scores = np.sort(smooth.reshape(3, -1))[:, -40:].mean(1)  # 1 % of 4096
    else:
        smooth = ndimage.gaussian_filter(total, (0, 4, 4))
        scores = smooth.max((1, 2))
    np.testing.assert_allclose(found["map"].numpy(), smooth, rtol=2e-5)
    np.testing.assert_allclose(found["score"].numpy(), scores, rtol=2e-5)


def test_bottleneck_blocks():
    """Wide-ResNet's blocks at a fraction of its width: inner width half of the outputs; 3, 4, 6 blocks upwards."""
    torch.manual_seed(0)
    channels = [8, 16, 32]
    down, up = Bottleneck(channels, 3, 0.5).double(), Decoder(channels, [3, 4, 6], 0.5).double()
    levels = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip(channels, (16, 8, 4), strict=True)]
    code = down(levels)
    assert code.shape == (2, 64, 2, 2)
    torch.testing.assert_close(code, literal_bottleneck(levels, down, bottleneck_block))
    decoded = up(code)
    assert [x.shape for x in decoded] == [x.shape for x in levels]
    for found, expected in zip(decoded, literal_decoder(code, up, bottleneck_block, torch.relu), strict=True):
        torch.testing.assert_close(found, expected)
    stages: Any = up.stages
    assert [len(stage) for stage in stages] == [3, 4, 6]
    assert [stage[0].body[2][0].weight.shape for stage in stages] == [(16, 16, 2, 2), (8, 8, 2, 2), (4, 4, 2, 2)]


@pytest.mark.parametrize(("name", "ratio", "counts"), [
    ("resnet18", None, [2, 2, 2]), ("resnet34", None, [3, 4, 6]), ("resnet50", 0.25, [3, 4, 6]),
    ("wide_resnet50_2", 0.5, [3, 4, 6]), ("mobilenetv3_small_050", None, [2, 2, 2]),
])  # fmt: skip
def test_mirrored_blocks(name, ratio, counts):
    with torch.device("meta"):
        assert blocks_of(Backbone(name, [1, 2, 3], "none")) == (ratio, counts)


def test_initial_weights():
    """Convolutions kaiming-normal by fan out, transposed ones as torch makes them, heads with bias, E_t as E_f."""
    model: Any = make("resnet18")
    weight = model.bottleneck.first[2][0].weight
    assert float(weight.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert float(model.heads[0][2].weight.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    up = model.decoder.stages[0][0].body[0][0].weight
    assert float(up.abs().max()) <= (1 / (256 * 4)) ** 0.5  # uniform, fan in of torch's default
    assert all(head.bias is not None for heads in model.heads for head in heads)
    frozen, trained = model.backbone.state_dict(), model.encoder.state_dict()
    torch.testing.assert_close(dict(trained), dict(frozen), rtol=0, atol=0)


# --- optimisation ---


@pytest.mark.parametrize(("variant", "eps", "amsgrad"), [
    ("one_class", 1e-8, False), ("unified", 1e-10, True), ("stable", 1e-10, False),
])  # fmt: skip
def test_groups_and_rates(variant, eps, amsgrad):
    model = make(variant=variant)
    made = model.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    rest, encoder = optimizer.param_groups
    assert {id(p) for p in encoder["params"]} == {id(p) for p in model.encoder.parameters() if p.requires_grad}
    unused = [name for name, p in model.encoder.named_parameters() if not p.requires_grad]
    assert unused
    assert all(".blocks.5." in name or ".blocks.4." in name for name in unused)  # beyond the level of 1/16
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in (rest, encoder) for p in group["params"]} == trained
    for group, rate in ((rest, 2e-3), (encoder, 1e-5)):
        assert (group["lr"], group["eps"], group["amsgrad"]) == (rate, eps, amsgrad)
    assert isinstance(made, dict) == (variant == "unified")
    if variant == "unified":
        rates = []
        for _ in range(100):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            made["lr_scheduler"]["scheduler"].step()
        np.testing.assert_allclose(rates, [[2e-3, 1e-5]] * 80 + [[4e-4, 2e-6]] * 20)


def test_variant_by_categories():
    assert make(categories=["a"]).variant == "one_class"
    assert make(categories=["a", "b"]).variant == "unified"
    assert make(categories=["a", "b"], variant="one_class").variant == "one_class"
    chosen = make(categories=["a", "b"], scoring={"image_score": "max"})
    assert chosen.scoring["image_score"] == "max"  # given by the user: stays
    assert chosen.scoring["pixel_smooth"] == {"sigma": 4, "size": 5}


@pytest.mark.parametrize(("options", "message"), [
    ({"variant": "two"}, "method.variant=two: choose auto, one_class, unified, stable"),
    ({"encoder_bn": "on"}, "method.encoder_bn=on: choose eval or train"),
    ({"encoder_bn": {"tile": "train"}}, "method.encoder_bn={'tile': 'train'}: choose eval or train"),
    ({"mining": [-3]}, r"method.mining=\[-3\]: give null, or the first α and the last one"),
    ({"size": 48}, "data.image_size=48×48: with this backbone's levels, give multiples of 32"),
])  # fmt: skip
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_drop_names_its_variant():
    changed = variants()
    changed["unified"]["lr_drop"] = {"at": 80, "factor": 0.2}
    stored = ReContrast(changed, variant="unified", backbone=Backbone(TINY, [1, 2, 3], "none", "32"))
    with pytest.raises(UserError, match=r"^method.variants.unified.lr_drop={'at': 80, 'factor': 0.2}: give null"):
        stored.check_training()


def test_modes_of_batch_norm():
    def modes(model):
        parts = {"E_f": model.backbone, "E_t": model.encoder, "decoder": model.decoder}
        return {name: any(m.training for m in part.modules()) for name, part in parts.items()}

    assert modes(make()) == {"E_f": False, "E_t": False, "decoder": True}
    for train in ("train", {"tile": "eval", "": "train"}):
        assert modes(make(encoder_bn=train)) == {"E_f": False, "E_t": True, "decoder": True}
    assert modes(make(variant="stable")) == {"E_f": False, "E_t": True, "decoder": True}
    model = make(encoder_bn="train").eval()
    assert not any(modes(model).values())
    assert modes(model.train())["E_t"]


# --- the stable variant ---


@pytest.mark.parametrize(
    ("precision", "device", "fast"),
    [("32", "cpu", False), ("bf16", "cpu", True), ("32", "cuda", True), ("auto", "cpu", has_bf16(torch.device("cpu")))],
)
def test_channels_last_only_where_it_is_faster(precision, device, fast):
    """What a batch norm and a transposed convolution inside the trained networks see: it must be one format."""
    model: Any = make(precision=precision)
    seen: list[torch.Tensor] = []
    model.lay_out(torch.device(device))
    for part in (model.encoder.net.blocks[1][0].bn1, model.bottleneck.blocks[0].body[0], model.decoder.stages[0][0]):
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.pairs({"image": images_of(2, 32).float(), "path": []})
    assert len(seen) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) == fast for x in seen if min(x.shape[1:]) > 1)


def test_stable_norm():
    """Of three channels the first two are alive, the last has a batch variance below its floor."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3).double()
    plain.running_mean = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    plain.running_var = torch.tensor([2.0, 1e-4, 1.0], dtype=torch.float64)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    layer = StableNorm(plain, 5e-4, 1e-6).double().train()
    floor = torch.tensor([5e-4, 1e-4, 5e-4], dtype=torch.float64)  # min(5e-4, pretrained variance)
    size = torch.tensor([1.0, 0.02, 0.02], dtype=torch.float64)[:, None, None]  # variances about 1, 4e-4, 4e-4
    x = (torch.randn(4, 3, 5, 5, dtype=torch.float64) * size + 1).requires_grad_()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    alive = x.var((0, 2, 3)) > floor
    assert alive.tolist() == [True, True, False]
    used = torch.stack([var[0], var[1], floor[2]])
    centred = x - mean[:, None, None]
    expected = centred / (used + 1e-6).sqrt()[:, None, None] * layer.weight[:, None, None] + layer.bias[:, None, None]
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert layer.running_var is not None
    assert layer.running_mean is not None
    kept = torch.where(alive, x.var((0, 2, 3)), floor)
    torch.testing.assert_close(layer.running_var, 0.9 * plain.running_var + 0.1 * kept.detach())
    torch.testing.assert_close(layer.running_mean, 0.9 * plain.running_mean + 0.1 * mean.detach())
    layer.eval()
    apart = (x - layer.running_mean[:, None, None]) / (layer.running_var + 1e-6).sqrt()[:, None, None]
    torch.testing.assert_close(layer(x), apart * layer.weight[:, None, None] + layer.bias[:, None, None])


@pytest.mark.parametrize(
    ("pause", "rests"),
    [(2, [False, False, False, True, True, False, True]), (0, [False] * 7)],
)
def test_stable_resets_and_rests(pause, rests):
    model = make(variant="stable")
    stable = model.own["stable"]
    assert (stable["min_var"], stable["eps"], stable["reset_every"], stable["pause"]) == (5e-4, 1e-6, 500, 100)
    stable |= {"reset_every": 3, "pause": pause}
    optimizer = model.configure_optimizers()
    decoder, encoder = (group["params"][0] for group in optimizer.param_groups)
    images, age, rested = images_of(2, 32).float(), [], []
    for step in range(7):
        at_step(model, step)
        model.training_step(batch_of(images), step).backward()
        before = encoder.detach().clone()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        age.append(int(optimizer.state[decoder]["step"]))
        rested.append(torch.equal(before, encoder))
    assert age == [1, 2, 3, 1, 2, 3, 1]
    assert rested == rests


# --- several devices ---


def over_two_ranks(rank: int, folder: Path, ranks: int) -> None:
    """Half of a batch a rank: batch norms and mining as over the whole batch."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.save(of_ranks(rank, ranks), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def of_ranks(rank: int, ranks: int) -> dict[str, Any]:
    """Loss, gradients and statistics of the stable variant and of E_t's own batch norm, on this rank's images."""
    found = {}
    for kind in ({"variant": "stable"}, {"variant": "one_class", "encoder_bn": "train"}):
        model = at_step(make(size=64, **kind).double(), 7)
        model = synchronise(model, torch.device("cpu")) if ranks > 1 else model  # type: ignore[assignment]
        loss = model.training_step(batch_of(images_of(4).chunk(ranks)[rank]), 0)
        loss.backward()
        found[kind["variant"]] = {
            "loss": loss.detach(),
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            "statistics": {name: x for name, x in model.state_dict().items() if "running" in name},
        }
    return found


def test_two_ranks_are_one_device(tmp_path):
    """Averaged over ranks, as DDP does, loss and gradients are the whole batch's."""
    started = [PROCESSES.Process(target=over_two_ranks, args=(rank, tmp_path, 2)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind, expected in of_ranks(0, 1).items():
        first, second = (rank[kind] for rank in ranks)
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, expected["loss"])
        assert first["gradients"].keys() == expected["gradients"].keys()
        scale = max(float(x.abs().max()) for x in expected["gradients"].values())
        for name, gradient in expected["gradients"].items():
            mean = (first["gradients"][name] + second["gradients"][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-6, atol=1e-9 * scale, msg=f"{kind} {name}")
        for name, statistic in expected["statistics"].items():
            torch.testing.assert_close(first["statistics"][name], statistic, rtol=1e-9, atol=1e-12, msg=name)
            assert torch.equal(first["statistics"][name], second["statistics"][name])
