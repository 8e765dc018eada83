"""UniAD beside a literal reading built on nn.MultiheadAttention, and its runs."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anomalib_lite.cli.schema import Scoring, check_group
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods import attention as attending
from anomalib_lite.methods.attention import Dropout, attend, drop
from anomalib_lite.methods.scoring import image_scores, smooth, smoothed_and_scored
from anomalib_lite.methods.transformer import LearnedPositions, ReconstructionTransformer, jitter, near
from anomalib_lite.methods.uniad import UniAD
from tests.helpers import run_programs as runs
from tests.helpers.feature_levels import Levels, batch
from tests.helpers.image_trees import make_mvtec

CHANNELS = (3, 9)


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"dim": 16, "heads": 2, "layers": 2, "hidden": 24, "neighbours": 3} | options
    return UniAD(backbone=Levels(CHANNELS), image_size=(32, 32), precision=32, **small)


# --- a literal reading: sequence first, a mask of -inf, PyTorch's attention ---


def attention(block: Any) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(block.query.in_features, block.heads, dtype=block.query.weight.dtype)
    with torch.no_grad():
        assert theirs.in_proj_weight is not None
        theirs.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
        theirs.out_proj.load_state_dict(block.out.state_dict())
    return theirs


def literal_mask(height: int, width: int, size: int) -> torch.Tensor:
    mask = torch.zeros(height, width, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            rows = slice(max(y - size // 2, 0), y + size // 2 + 1)
            columns = slice(max(x - size // 2, 0), x + size // 2 + 1)
            mask[y, x, rows, columns] = -torch.inf
    return mask.view(height * width, height * width)


def feed(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.relu(F.linear(x, ffn[0].weight, ffn[0].bias)), ffn[-1].weight, ffn[-1].bias)


def literal(net: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, L, C] -> [B, L, C], without dropout."""
    place = net.positions()[:, None]
    memory = net.inputs(tokens.transpose(0, 1))
    for layer in net.encoder:
        seen = attention(layer.attention)(memory + place, memory + place, memory, attn_mask=mask)[0]
        memory = layer.norm1(memory + seen)
        memory = layer.norm2(memory + feed(layer.ffn, memory))
    out = memory
    for layer in net.decoder:
        x = torch.cat([layer.query[:, None]] * tokens.shape[0], 1)
        x = layer.norm1(x + attention(layer.to_memory)(x + place, memory + place, memory, attn_mask=mask)[0])
        x = layer.norm2(x + attention(layer.to_previous)(x + place, out + place, out, attn_mask=mask)[0])
        out = layer.norm3(x + feed(layer.ffn, x))
    return net.outputs(net.norm(out)).transpose(0, 1)


@pytest.mark.parametrize("neighbours", [3, None])
def test_the_transformer_literally(neighbours):
    torch.manual_seed(0)
    net = ReconstructionTransformer(7, (4, 5), 16, 3, 4, 32, neighbours=neighbours).double().eval()
    with torch.no_grad():
        for part in net.parameters():
            part.add_(0.2 * torch.randn_like(part))
    tokens = torch.randn(3, 20, 7, dtype=torch.float64)
    mask = None if neighbours is None else literal_mask(4, 5, neighbours)
    torch.testing.assert_close(net(tokens), literal(net, tokens, mask), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("grid", "size"), [((14, 14), 7), ((16, 16), 7), ((9, 5), 3)])
def test_the_neighbour_mask_by_its_definition(grid, size):
    assert torch.equal(near(grid, size), literal_mask(grid[0], grid[1], size).isinf())


def test_no_token_sees_its_neighbourhood():
    """With one encoder layer and one decoder layer, a token's own features reach its reconstruction by no way of one
    step: gradients of the encoder's attention are zero within the neighbourhood."""
    torch.manual_seed(0)
    net = ReconstructionTransformer(5, (9, 9), 8, 1, 2, 8, dropout=0.0, neighbours=7).double()
    x = torch.randn(1, 81, 8, dtype=torch.float64, requires_grad=True)
    layer: Any = net.encoder[0]
    out = layer.attention(torch.zeros_like(x), x, x, net.mask)
    (gradient,) = torch.autograd.grad(out[0, 40].sum(), x)
    reached = (gradient[0].abs().sum(1) > 0).view(9, 9)
    expected = torch.ones(9, 9, dtype=torch.bool)
    expected[1:8, 1:8] = False
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_by_its_definition(p):
    torch.manual_seed(0)
    x = torch.rand(400, 401) + 0.5
    found = drop(x, p)
    gone = found == 0
    torch.testing.assert_close(found[~gone], x[~gone] / (1 - p), rtol=1e-4, atol=0)
    share = gone.double()
    for part in (share, *(share.flatten()[i::4] for i in range(4)), share[:, :-1] * share[:, 1:] / p):
        assert float(part.mean()) == pytest.approx(p, abs=6 * (p / part.numel()) ** 0.5)  # also of neighbours: p²
    assert torch.equal(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cached", [1, 170, 2**19])  # weights: one head at a time, two, and all
def test_attention_of_cpus_by_its_formula(masked, dropout, cached, monkeypatch):
    """Outputs and gradients in float64, with the random numbers that were drawn; keys are shared by all images."""
    noise: list[torch.Tensor] = []
    draw = attending.random_noise
    monkeypatch.setattr(attending, "CACHED", cached)
    monkeypatch.setattr(attending, "random_noise", lambda x: noise.append(draw(x)) or noise[-1])  # type: ignore[func-returns-value]
    made = torch.Generator().manual_seed(0)
    q, v, weights = (torch.randn(3, 4, 9, 6, generator=made, dtype=torch.float64) for _ in range(3))
    k = torch.randn(1, 4, 9, 6, generator=made, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    seen = ~near((3, 3), 1) if masked else None
    found = attend(q, k.expand(3, -1, -1, -1), v, seen, dropout)
    scores = q @ k.mT / 6**0.5
    share = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
    if dropout:
        drawn = torch.cat([part.flatten() for part in noise]).view(share.shape)
        share = torch.where(drawn + 2**15 < 0.25 * 2**16, 0.0, share / 0.75)
    torch.testing.assert_close(found, share @ v)
    expected = torch.autograd.grad((share @ v * weights).sum(), inputs)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_dropout():
    """It is the factor by which each element was multiplied."""
    x = torch.rand(50, 7) + 0.5
    out = drop(x.requires_grad_(), 0.25)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, out / x)
    assert gradient.unique().tolist() == pytest.approx([0, 4 / 3])


def test_positions_are_a_columns_and_a_rows_vector():
    positions = LearnedPositions((3, 5), 8)
    found = positions().detach()
    for y in range(3):
        for x in range(5):
            assert torch.equal(found[y * 5 + x], torch.cat([positions.column[x], positions.row[y]]))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_weights_are_drawn_as_published():
    """Xavier uniform, PyTorch's for the joint projection of queries, keys and values; learned queries from N(0, 1)."""
    torch.manual_seed(0)
    net: Any = ReconstructionTransformer(272, (14, 14))
    block, theirs = net.encoder[0].attention, nn.MultiheadAttention(256, 8)
    for part in (block.query, block.key, block.value):
        assert part.weight.abs().max().item() == pytest.approx(theirs.in_proj_weight.abs().max().item(), rel=1e-2)
    bounds = {net.inputs: 528, net.outputs: 528, block.out: 512, net.decoder[0].ffn[0]: 1280}
    for layer, fans in bounds.items():
        assert layer.weight.abs().max().item() == pytest.approx((6 / fans) ** 0.5, rel=1e-2)
        assert not layer.bias.any()
    assert net.decoder[3].query.std().item() == pytest.approx(1, abs=0.02)
    attention_, ffn, norm = 4 * (256 * 256 + 256), 2 * 256 * 1024 + 1024 + 256, 512
    encoder, decoder = attention_ + ffn + 2 * norm, 2 * attention_ + ffn + 3 * norm + 196 * 256
    ends = 272 * 256 + 256 + 256 * 272 + 272
    assert sum(p.numel() for p in net.parameters()) == 4 * (encoder + decoder) + ends + norm + 2 * 14 * 128


def literal_tokens(images: torch.Tensor) -> torch.Tensor:
    """Every level on 4², corners aligned, [B, 16, 12]."""
    large, small = (level.double() for level in Levels(CHANNELS)(images))
    places = np.arange(4) * 7 / 3
    low = np.minimum(places.astype(int), 6)
    weights = np.zeros((4, 8))
    for i in range(4):
        weights[i, low[i]], weights[i, low[i] + 1] = 1 - places[i] + low[i], places[i] - low[i]
    w = torch.from_numpy(weights)
    return torch.cat([w @ large @ w.T, small], 1).flatten(2).transpose(1, 2)


def test_map_and_loss_literally():
    uniad, given = model(jitter=0.0, dropout=0.0), batch()
    double = copy.deepcopy(uniad.net).double().eval()
    tokens = literal_tokens(given["image"])
    torch.testing.assert_close(uniad.joined_tokens(given).double(), tokens, atol=1e-5, rtol=0)
    found = literal(double, tokens, literal_mask(4, 4, 3))
    assert uniad.training_step(given, 0).item() == pytest.approx(((found - tokens) ** 2).mean().item(), rel=1e-5)
    root = ((found - tokens) ** 2).sum(-1).sqrt().view(3, 1, 4, 4)
    expected = nn.UpsamplingBilinear2d(size=32)(root)[:, 0]
    maps = uniad.eval().anomaly_map(given)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
    scored = UniAD(backbone=Levels(CHANNELS), image_size=(32, 32), dim=16, heads=2, neighbours=3,
                   scoring={"image_smooth": {"pool": 16}})  # fmt: skip
    scores = smoothed_and_scored(maps, (32, 32), scored.scoring)["score"]
    by_hand = [max(m[y : y + 16, x : x + 16].mean() for y in range(17) for x in range(17)) for m in expected.detach()]
    torch.testing.assert_close(scores.double(), torch.stack(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [[1, 2], [2, 3, 4]])
def test_what_is_kept_changes_no_bit(layers):
    """Against levels that are stored as they are, channels last, and joined in every step."""
    torch.manual_seed(0)
    backbone = Backbone("test_resnet.r160_in1k", layers, "none", "32")
    uniad = UniAD(backbone=backbone, image_size=(96, 64), precision=32, dim=16, heads=2, layers=1, neighbours=1)
    given = torch.randn(5, 3, 96, 64)
    joined = []
    for level in backbone(given):
        row = level.movedim(1, -1).flatten(1).unflatten(1, level.movedim(1, -1).shape[1:])
        joined.append(F.interpolate(row.movedim(-1, 1), uniad.grid, mode="bilinear", align_corners=True))
    tokens = torch.cat(joined, 1).flatten(2).mT
    [kept] = uniad.stored_levels(backbone(given))
    stored = {"features": [kept.movedim(1, -1).contiguous()]}
    assert kept.shape == (5, sum(backbone.channels), *uniad.grid)
    for either in (stored, {"image": given}):
        assert torch.equal(uniad.joined_tokens(either), tokens)
    torch.manual_seed(1)
    loss = uniad.training_step(stored, 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert loss == F.mse_loss(uniad.net(jitter(tokens.contiguous(), uniad.jitter)), tokens)
    uniad.eval()
    errors = torch.linalg.vector_norm(uniad.net(tokens.contiguous()) - tokens, dim=-1).unflatten(1, uniad.grid)
    maps = F.interpolate(errors[:, None], (96, 64), mode="bilinear", align_corners=True)[:, 0]
    assert torch.equal(uniad.anomaly_map(stored), maps)


def test_pooling_for_image_scores():
    maps = torch.rand(2, 20, 9, dtype=torch.float64)
    pooled = smooth(maps, {"pool": 4})
    assert pooled.shape == (2, 17, 6)
    assert pooled[1, 3, 2].item() == pytest.approx(maps[1, 3:7, 2:6].mean().item())
    assert image_scores(smooth(maps, {"pool": 99}), "max").tolist() == pytest.approx(maps.mean((1, 2)).tolist())


@pytest.mark.parametrize(("key", "how"), [("pixel_smooth", {"pool": 16}), ("image_smooth", {"pool": 0})])
def test_pooling_is_for_image_scores_alone(key, how):
    defaults = {"pixel_smooth": 4, "image_smooth": "same", "image_score": "max", "quantile": 0.99, "fpr_limits": [0.3]}
    check_group(defaults | {"image_smooth": {"pool": 16}}, Scoring, "scoring")
    with pytest.raises(UserError, match=rf"scoring.{key}=\{{'pool': \d+\}}: give"):
        check_group(defaults | {key: how}, Scoring, "scoring")


def test_only_training_is_jittered_and_dropped_out():
    uniad, given = model(), batch()
    losses = {uniad.training_step(given, 0).item() for _ in range(3)}
    assert len(losses) == 3
    uniad.eval()
    assert torch.equal(uniad.anomaly_map(given), uniad.anomaly_map(given))


@pytest.mark.parametrize(
    "options", [{"neighbours": 5}, {"neighbours": 7}, {"neighbours": 2}, {"neighbours": 0}, {"neighbours": -1}]
)
def test_a_mask_that_leaves_nothing_is_refused(options):
    with pytest.raises(UserError, match=r"method.neighbours=-?\d: give null, or an odd number from 1 to 3, .* 4×4"):
        model(**options)


@pytest.mark.parametrize(
    "drop", [0.8, {"at": 0.8}, {"at": 1, "factor": 0.1}, {"at": 0, "factor": 0.1}, {"at": 0.8, "factor": -1}]
)
def test_a_drop_that_can_not_happen_is_refused(drop):
    """In a new run; stored runs may have one."""
    uniad = model(drop=drop)
    message = rf"^method.drop={re.escape(str(drop))}: give null, or {{at: A, factor: F}} with a share A of the budget"
    with pytest.raises(UserError, match=message):
        uniad.check_training()


# --- runs ---


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=4, good=2, defects={"broken": 2})
    make_mvtec(root, "wood", train=3, good=2, defects={"scratch": 2})
    return root


@pytest.fixture(scope="module")
def arguments(root):
    return [
        "method=uniad", *runs.folder_data(root, "[bottle,wood]"), "backbone=resnet18", "backbone.layers=[1,2]",
        "backbone.name=test_resnet.r160_in1k",
        "data.image_size=48", "data.batch_size=4", "method.dim=16", "method.hidden=16", "method.layers=1",
        "method.neighbours=3", "trainer.max_epochs=3", "trainer.log_every=1", "trainer.checkpoint_minutes=0",
        "method.drop.at=0.7", "method.optimizer.lr=1e-2",
    ]  # fmt: skip


def test_the_rate_drops(arguments, tmp_path, monkeypatch):
    rates = []

    def note(self, batch, batch_idx):
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    with monkeypatch.context() as patch:
        patch.setattr(UniAD, "on_train_batch_start", note, raising=False)
        result = runs.result_of(*arguments, run_dir=tmp_path / "whole")
    assert rates == pytest.approx(
        [1e-2] * 4 + [1e-3] * 2
    )  # 7 images in batches of 4; ×0.1 after 0.7 of them, that is 4
    assert result["protocol"]["scoring"]["image_smooth"] == {"pool": 16}
