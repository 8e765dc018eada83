"""RLR's blocks against a literal reading in float64 loops, its masks by their definition, and its runs."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods import attention
from anomalib_lite.methods.attention import Attention, LocalWindow
from anomalib_lite.methods.rlr import RLR, Layer, Level, error
from anomalib_lite.methods.transformer import jitter, largest_window, near, sine_positions
from tests.helpers.feature_levels import Levels, batch

CHANNELS = (6, 10)


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"windows": [5, 3], "dims": [16, 8], "heads": 2, "layers": 2} | options
    return RLR(backbone=Levels(CHANNELS), image_size=(32, 32), precision=32, **small)  # type: ignore[arg-type]


# --- a literal reading, in float64, token by token ---


def array(tensor: torch.Tensor | nn.Parameter) -> np.ndarray:
    return tensor.detach().double().numpy()


def apply(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ array(layer.weight).T + array(layer.bias)


def layer_norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * array(layer.weight) + array(layer.bias)


def literal_attention(block: Attention, query, key, value, seen) -> np.ndarray:
    """Of one image, [L, d]; `seen(i, j)` says whether query i may see key j."""
    q, k, v = apply(block.query, query), apply(block.key, key), apply(block.value, value)
    e = q.shape[1] // block.heads
    out = np.zeros_like(q)
    for head in range(block.heads):
        part = slice(head * e, (head + 1) * e)
        for i in range(len(q)):
            keys = [j for j in range(len(k)) if seen(i, j)]
            weights = np.exp([q[i, part] @ k[j, part] / math.sqrt(e) for j in keys])
            out[i, part] = sum(w * v[j, part] for w, j in zip(weights / weights.sum(), keys, strict=True))
    return apply(block.out, out)


def within(i: int, j: int, width: int, window: int) -> bool:
    reach = window // 2
    return abs(i // width - j // width) <= reach and abs(i % width - j % width) <= reach


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def literal_layer(layer: Any, x: np.ndarray, r: np.ndarray, width: int, window: int) -> np.ndarray:
    a = literal_attention(layer.local, x, r, r, lambda i, j: within(i, j, width, window))
    b = literal_attention(layer.masked, x, r, x, lambda i, j: not within(i, j, width, window))
    y = layer_norm(layer.norm1, 2 * a + b)
    hidden, out = layer.ffn[0], layer.ffn[-1]
    return layer_norm(layer.norm2, y + apply(out, gelu(apply(hidden, y))))


def literal_positions(height: int, width: int, dim: int) -> np.ndarray:
    """Every frequency's sine and cosine beside each other, rows in the first half of the channels."""
    out = np.zeros((height * width, dim))
    for y in range(height):
        for x in range(width):
            for axis, place in enumerate((y, x)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (2 * i / (dim / 2))
                    at = axis * dim // 2 + 2 * i
                    out[y * width + x, at : at + 2] = math.sin(angle), math.cos(angle)
    return out


def literal_level(level: Any, tokens: np.ndarray, width: int, window: int) -> np.ndarray:
    """One image's tokens [L, C] -> [L, C]."""
    positions = literal_positions(len(tokens) // width, width, level.embed.out_features)
    x = apply(level.embed, tokens) + positions
    r = apply(level.embed_reference, array(level.reference)) + positions
    for layer in level.layers:
        x = literal_layer(layer, x, r, width, window)
    return apply(level.head, layer_norm(level.norm, x))


def literal_pool(feature: np.ndarray) -> np.ndarray:
    """3×3 means of [C, H, W], zeros outside counted."""
    padded = np.pad(feature, ((0, 0), (1, 1), (1, 1)))
    h, w = feature.shape[1:]
    return np.array([[padded[:, y : y + 3, x : x + 3].mean((1, 2)) for x in range(w)] for y in range(h)]).transpose(
        2, 0, 1
    )


def literal_error(found: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    cosine = (found * tokens).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(tokens, axis=-1)
    return ((found - tokens) ** 2).mean(-1) + 1 - cosine


def literal_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with corners aligned."""
    h, w = image.shape
    out = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            sy, sx = y * (h - 1) / (size - 1), x * (w - 1) / (size - 1)
            y0, x0 = min(int(sy), h - 2), min(int(sx), w - 2)
            fy, fx = sy - y0, sx - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x0 + 1] * fx
            out[y, x] = top * (1 - fy) + (image[y0 + 1, x0] * (1 - fx) + image[y0 + 1, x0 + 1] * fx) * fy
    return out


# --- blocks ---


@pytest.mark.parametrize(("side", "window"), [(16, 5), (32, 7), (64, 11)])
def test_masks_by_their_definition(side, window):
    mask = near((side, side), window).numpy()
    reach = window // 2
    for y, x in [
        (0, 0),
        (0, side // 2),
        (1, side - 1),
        (side // 2, side // 2),
        (side - 1, reach),
        (side - 1, side - 1),
    ]:
        expected = np.zeros((side, side), bool)
        expected[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = True
        np.testing.assert_array_equal(mask[y * side + x].reshape(side, side), expected)
    # a token sees reach + 1 cells an axis at the border, and up to the window inside
    counts = np.minimum(np.arange(side) + reach, side - 1) - np.maximum(np.arange(side) - reach, 0) + 1
    np.testing.assert_array_equal(mask.sum(1).reshape(side, side), np.outer(counts, counts))
    assert (mask == mask.T).all()


def test_masks_of_a_level_are_built_once_and_not_stored():
    level = model().levels[0]
    outside = level.outside
    assert torch.equal(outside, ~near((8, 8), 5))
    level(torch.randn(1, 64, 6))
    assert level.outside is outside
    assert not {"outside", "positions", "window.allowed"} & set(level.state_dict())


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (16, 16)])
def test_positions_literally(grid):
    expected = literal_positions(grid[0], grid[1], 24)
    np.testing.assert_allclose(sine_positions(grid, 24).numpy(), expected, atol=1e-6)
    assert len(np.unique(expected.round(6), axis=0)) == grid[0] * grid[1]  # no two cells alike


@pytest.mark.parametrize(("heads", "masked"), [(1, False), (4, True)])
def test_attention_is_pytorchs(heads, masked):
    """With its own weights in nn.MultiheadAttention, and literally; keys and values also shared by the batch."""
    block = Attention(8, heads).double()
    reference = nn.MultiheadAttention(8, heads, batch_first=True).double()
    with torch.no_grad():
        for part in block.parameters():
            part.normal_()
        reference.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
        reference.out_proj.load_state_dict(block.out.state_dict())
    q, k, v = (torch.randn(n, 12, 8, dtype=torch.float64) for n in (3, 1, 3))
    seen = near((3, 4), 3) if masked else None
    found = block(q, k, v, seen)
    expected, _ = reference(q, k.expand(3, -1, -1), v, attn_mask=None if seen is None else ~seen)
    torch.testing.assert_close(found, expected)
    literal = literal_attention(block, array(q[1]), array(k[0]), array(v[1]), lambda i, j: seen is None or seen[i, j])
    np.testing.assert_allclose(array(found[1]), literal, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "window", "tile"),
    [((16, 16), 5, 8), ((32, 32), 7, 8), ((64, 64), 11, 8), ((5, 9), 3, 4), ((3, 3), 5, 8), ((7, 4), 1, 2)],
)
def test_local_window_is_masked_attention(grid, window, tile):
    """Outputs and gradients in float64; at 64² compared on the queries of a few cells, by hand."""
    length, e = grid[0] * grid[1], 4
    local = LocalWindow(grid, window, tile)
    q = torch.randn(2, 3, length, e, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 3, length, e, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 3, length, e, dtype=torch.float64)
    found = local(q, k, v)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    if length > 1024:
        mask = near(grid, window)
        for i in (0, 63, 64 * 31 + 32, length - 1):
            keys = mask[i].nonzero()[:, 0]
            share = (q[:, :, i : i + 1] @ k[:, :, keys].mT / math.sqrt(e)).softmax(-1)
            torch.testing.assert_close(found[:, :, i : i + 1], share @ v[:, :, keys])
        return
    scores = q @ k.mT / math.sqrt(e)
    expected = scores.masked_fill(~near(grid, window), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other)


def test_jitter_by_its_formula():
    tokens = torch.randn(4, 50, 40, dtype=torch.float64) * torch.rand(4, 50, 1)
    torch.manual_seed(3)
    found = jitter(tokens, 4.0)
    torch.manual_seed(3)
    noise = torch.randn_like(tokens)
    scale = np.sqrt((tokens.numpy() ** 2).sum(-1, keepdims=True)) / 40 * 4
    np.testing.assert_allclose(found.numpy(), tokens.numpy() + noise.numpy() * scale, atol=1e-14)


def test_a_layer_literally():
    torch.manual_seed(0)
    layer: Any = Layer(8, 2, (2, 1), True).double()
    with torch.no_grad():
        for part in layer.parameters():
            part.add_(0.3 * torch.randn_like(part))
    x, r = torch.randn(2, 20, 8, dtype=torch.float64), torch.randn(1, 20, 8, dtype=torch.float64)
    found = layer(x, r, LocalWindow((4, 5), 3), ~near((4, 5), 3))
    for i in range(2):
        np.testing.assert_allclose(array(found[i]), literal_layer(layer, array(x[i]), array(r[0]), 5, 3), atol=1e-10)


def test_a_level_literally():
    torch.manual_seed(0)
    level: Any = Level(6, (4, 4), 3, 8, 2, 2, (2, 1), True, True, True).double()
    tokens = torch.randn(2, 16, 6, dtype=torch.float64)
    level.positions = torch.from_numpy(literal_positions(4, 4, 8))
    for i, found in enumerate(level(tokens)):
        np.testing.assert_allclose(array(found), literal_level(level, array(tokens[i]), 4, 3), atol=1e-10)


def test_the_error_literally():
    found, tokens = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    np.testing.assert_allclose(error(found, tokens).numpy(), literal_error(found.numpy(), tokens.numpy()), atol=1e-12)


def test_initial_weights():
    """As the authors' code draws them: standard deviations by the formulas, at 200 channels and 512 inside."""
    torch.manual_seed(0)
    level: Any = Level(200, (4, 4), 3, 512, 1, 8, (2, 1), True, True, True)
    normal = [level.embed.weight, level.embed_reference.weight, level.reference]
    deviations = [math.sqrt(2 / 200), math.sqrt(2 / 200), 1]  # kaiming-normal: gain √2, fan_in
    for weight, deviation in zip(normal, deviations, strict=True):
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.03)
        assert float(weight.detach().abs().max()) > 3 * deviation  # no uniform distribution
    block = level.layers[0]
    linear = [block.local.out, block.masked.out, block.ffn[0], block.ffn[-1], level.head]
    limits = [(part.weight, 1 / math.sqrt(part.in_features)) for part in linear]  # nn.Linear: U(±1/√fan_in)
    limits += [(part.bias, 1 / math.sqrt(part.in_features)) for part in [*linear[2:], level.embed]]
    for part in (block.local, block.masked):  # nn.MultiheadAttention: Xavier of one matrix [3·512, 512]
        limits += [(each.weight, math.sqrt(6 / (4 * 512))) for each in (part.query, part.key, part.value)]
        assert not any(each.bias.any() for each in (part.query, part.key, part.value, part.out))
    for values, limit in limits:
        values = values.detach()
        assert float(values.std()) == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert 0.95 * limit < float(values.abs().max()) <= limit


# --- the whole ---


def literal_errors(rlr: Any, images: torch.Tensor) -> list[list[np.ndarray]]:
    """Of every image and level [side, side]."""
    errors: list[list[np.ndarray]] = []
    for i in range(len(images)):
        errors.append([])
        for level, feature, side, window in zip(
            rlr.levels, Levels(CHANNELS)(images), Levels.sides, (5, 3), strict=True
        ):
            tokens = literal_pool(array(feature[i])).reshape(len(feature[i]), -1).T
            errors[i].append(literal_error(literal_level(level, tokens, side, window), tokens).reshape(side, side))
    return errors


def test_map_and_loss_literally():
    rlr, given = model(jitter=0.0), batch()
    errors = literal_errors(rlr, given["image"])
    maps = rlr.anomaly_map(given).detach().numpy()
    assert maps.shape == (3, 32, 32)
    assert maps.dtype == np.float32
    expected = [np.mean([literal_resize(level, 32) for level in image], 0) for image in errors]
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    loss = sum(np.mean([image[i] for image in errors]) for i in range(2))
    assert rlr.training_step(given, 0).item() == pytest.approx(loss, rel=1e-5)


def test_training_sees_jittered_tokens_and_is_judged_by_clean_ones():
    rlr, given = model(jitter=4.0), batch()
    seen: list[torch.Tensor] = []
    rlr.levels[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rlr.training_step(given, 0)
    rlr.anomaly_map(given)
    jittered, clean = seen
    assert not torch.equal(jittered, clean)
    ratio = (jittered - clean) / torch.linalg.vector_norm(clean, dim=-1, keepdim=True) * CHANNELS[0] / 4
    assert float(ratio.std()) == pytest.approx(1, abs=0.05)  # 1152 draws
    assert abs(float(ratio.mean())) < 0.1


def test_levels_are_independent_models():
    """The second level's gradients are those of its own loss alone."""
    rlr, given = model(jitter=0.0), batch()
    rlr.training_step(given, 0).backward()
    found = [p.grad.clone() for p in rlr.levels[1].parameters()]
    rlr.zero_grad()
    list(rlr.errors(given, 0.0))[1].mean().backward()
    for one, p in zip(found, rlr.levels[1].parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
    assert all(p.grad is None for p in rlr.levels[0].parameters())


def test_the_reference_is_projected_once_a_batch(monkeypatch):
    """In test layer by layer; in training as one matrix product, as what is projected of the images is."""
    rlr = model()
    layer, rows = rlr.levels[0].layers[1], []
    for part in (layer.local.key, layer.local.value, layer.masked.key, layer.masked.value, layer.local.query):
        part.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        rlr.anomaly_map(batch(3))
    assert sorted(rows) == [1, 1, 1, 3, 3]
    plain, shapes = attention.F.linear, list[tuple[int, ...]]()

    def noted(x, weight, bias):
        shapes.append((*x.shape[:2], *weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(attention.F, "linear", noted)
    layer(torch.randn(3, 64, 16), torch.randn(1, 64, 16), None, None)
    assert sorted(shape for shape in shapes if shape[2:] == (48, 16)) == [(1, 64, 48, 16), (3, 64, 48, 16)]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 3), (4, 4), (4, 7), (9, 5), (16, 16)])
def test_the_largest_window_leaves_every_token_some(grid):
    leaves = [w for w in range(1, 40, 2) if (~near(grid, w)).any(1).all()]
    assert largest_window(grid) == max(leaves, default=-1)


def test_published_windows_and_widths():
    class EfficientNetB6(Levels):
        reductions = (8, 16)

    rlr = RLR(backbone=EfficientNetB6((72, 200)), image_size=(256, 256))
    large, small = (level for level in rlr.levels)
    assert (large.embed.out_features, small.embed.out_features) == (256, 512)  # type: ignore[union-attr]
    assert torch.equal(large.outside, ~near((32, 32), 7))  # type: ignore[arg-type]
    assert torch.equal(small.outside, ~near((16, 16), 5))  # type: ignore[arg-type]
    assert (large.window.reach, small.window.reach) == (3, 2)  # type: ignore[union-attr]
    assert [len(level.layers) for level in rlr.levels] == [4, 4]  # type: ignore[arg-type]
    assert small.layers[0].ffn[0].out_features == 2048  # type: ignore[index, union-attr]


ABLATIONS: dict[str, dict[str, Any]] = {
    "no locality": {"locality": False},
    "not masked": {"masked": False},
    "image's keys": {"learnable_key": False},
    "only A": {"mix": [1, 0]},
    "only B": {"mix": [0, 1]},
    "all of A and B": {"locality": False, "masked": False, "learnable_key": False},
    "no jitter": {"jitter": 0.0},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_and_differ(name):
    whole, other, given = model(), model(**ABLATIONS[name]), batch()
    missing = other.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    loss = other.training_step(given, 0)
    loss.backward()
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert {n for n, p in other.named_parameters() if p.grad is not None} == trained  # nothing is left over
    if name != "no jitter":
        assert not torch.allclose(other.anomaly_map(given), whole.anomaly_map(given), rtol=1e-3)


def test_ablated_blocks_literally():
    torch.manual_seed(0)
    tokens, r = torch.randn(1, 20, 8, dtype=torch.float64), torch.randn(1, 20, 8, dtype=torch.float64)
    layer: Any = Layer(8, 2, (0, 1), False).double()
    assert layer.local is None
    x = array(tokens[0])
    b = literal_attention(layer.masked, x, x, x, lambda i, j: True)
    y = layer_norm(layer.norm1, b)
    expected = layer_norm(layer.norm2, y + apply(layer.ffn[-1], gelu(apply(layer.ffn[0], y))))
    np.testing.assert_allclose(array(layer(tokens, r, None, None)[0]), expected, atol=1e-10)


def test_clipping():
    """Lightning calls this after the backward pass; without method.clip the gradient stays."""
    norms = []
    for clip in (None, 1e-3):
        found = model(clip=clip)
        found.training_step(batch(), 0).backward()
        found.configure_gradient_clipping(torch.optim.Adam(found.parameters()))
        norms.append(sum(float(p.grad.square().sum()) for p in found.parameters() if p.grad is not None) ** 0.5)
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_zero_fill_makes_a_step_a_level():
    """As under torch 1.12, whose zero_grad left zeros: a level's moments move it in the other levels' steps, too.

    Before its own first step a level has no gradient, so Adam counts no step for it.
    """
    found, expected, given = model(zero_fill=True, jitter=0.0), model(jitter=0.0), batch()
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (found, expected)]
    found.optimizers = lambda: optimizers[0]
    found.manual_backward = lambda loss: loss.backward()
    for _ in range(3):
        found.training_step(given, 0)
        for i in range(2):
            optimizers[1].zero_grad(set_to_none=False)
            list(expected.errors(given, 0.0))[i].mean().backward()
            optimizers[1].step()
    counts = [float(optimizers[0].state[level.head.weight]["step"]) for level in found.levels]
    assert counts == [6, 5]
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    alone = model(jitter=0.0)
    optimizer = torch.optim.Adam(alone.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        alone.training_step(given, 0).backward()
        optimizer.step()
    assert not torch.allclose(alone.levels[0].head.weight, found.levels[0].head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": None}, r"method.windows: .* 16², 32² and 64² tokens, and a level has 8×8; give one odd number"),
        ({"windows": [3]}, r"method.windows=\[3\]: give one for each of the backbone's 2 levels"),
        ({"windows": [3, 4]}, r"method.windows=\[3, 4\]: 4 is not an odd number"),
        ({"windows": [3, 5]}, r"method.windows=\[3, 5\]: 5 leaves nothing .* 4×4 tokens; give at most 3"),
        ({"layers": 0}, "method.layers=0: give a whole number from 1"),
        ({"mix": [-1, 2]}, r"method.mix=\[-1, 2\]: .* from 0"),
        ({"dims": [16]}, r"method.dims=\[16\]: give one for each"),
        ({"dims": [16, 6]}, r"method.dims=\[16, 6\]: give multiples of 4 and of method.heads=2"),
        ({"mix": [0, 0]}, r"method.mix=\[0, 0\]: .*not both 0"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as raised:
        model(**options)
    assert "\n" not in str(raised.value)


def test_a_window_may_hold_everything_where_nothing_is_masked():
    assert torch.isfinite(model(windows=[15, 7], masked=False).anomaly_map(batch())).all()


def test_learns_to_reconstruct_normal_features_and_not_others():
    """Features that lie on a line through a pattern of positions: trained, the others' error is far larger."""
    rlr = model(jitter=0.5)
    generator = torch.Generator().manual_seed(1)
    pattern, level = torch.randn(2, 3, 32, 32, generator=generator)

    def images(count, spread):
        return {"image": pattern + spread * torch.randn(count, 1, 1, 1, generator=generator) * level, "path": []}

    optimizer = torch.optim.Adam(rlr.parameters(), 3e-3)
    rlr.features = lambda given: Levels(CHANNELS)(given["image"])
    for _ in range(60):
        optimizer.zero_grad()
        rlr.training_step(images(8, 0.3), 0).backward()
        optimizer.step()
    other = images(8, 0.3)
    other["image"] = other["image"].flip(2)  # the same numbers in other places
    with torch.no_grad():
        normal, odd = (float(rlr.anomaly_map(x).mean()) for x in (images(8, 0.3), other))
    assert odd > 3 * normal


def test_fused_adam_is_adam():
    """What the configuration asks for, beside the plain one."""
    results = []
    for fused in (True, False):
        rlr, given = model(), batch()
        optimizer = partial(torch.optim.Adam, lr=1e-3, fused=fused)(rlr.parameters())
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            rlr.training_step(given, 0).backward()
            optimizer.step()
        results.append(rlr.levels[0].head.weight)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
