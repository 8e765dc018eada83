"""norm_occ and its closed form against a literal reading of the specification, in float64 NumPy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from anomalib_lite.errors import UserError
from anomalib_lite.methods.moments import descent_time
from anomalib_lite.methods.norm_occ import NormOCC, NormOCCClosedForm, descent
from anomalib_lite.methods.patches import patch_features, projection
from tests.helpers.feature_levels import ChannelLevels
from tests.methods.test_rlr import literal_pool

IMAGES, CHANNELS, SIDE = 12, (3, 2), 4


def make_images(seed=0):
    """Correlated channels with a mean, so that S and μ are of no special form."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(sum(CHANNELS),) * 2)
    images = np.einsum("dc,nchw->ndhw", mix, rng.normal(size=(IMAGES, sum(CHANNELS), SIDE, SIDE)))
    return torch.from_numpy(images + rng.normal(size=(sum(CHANNELS), 1, 1))).float()


def batches(images, size):
    for i, part in enumerate(images.split(size)):
        index = i * size + torch.arange(len(part))
        yield {"image": part, "index": index, "path": [f"{i}-{j}" for j in range(len(part))]}


def fitted(method, images, size=5, **options: Any):
    torch.manual_seed(0)
    model = method(backbone=ChannelLevels(), **options)
    data = SimpleNamespace(fit_dataloader=lambda: batches(images, size))
    model.trainer = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(lightning_module=model))
    model.transfer_batch_to_device = lambda batch, device, index: batch
    model.on_fit_start()
    return model


def patches(images):
    """φ of every position in float64, [N, C]."""
    features = patch_features(ChannelLevels()(images.double()))
    return features.movedim(1, -1).reshape(-1, sum(CHANNELS)).numpy()


def maps_of(model, images):
    with torch.no_grad():
        batch = {"image": images, "path": [f"x{i}" for i in range(len(images))]}
        return model.anomaly_map(batch).double().numpy()


def literal_resize(level, height, width):
    """Bilinear, pixel centres at halves, borders repeated."""
    n, c, h, w = level.shape
    out = np.zeros((n, c, height, width))
    for y in range(height):
        for x in range(width):
            sy = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
            sx = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = level[..., y0, x0] * (1 - sx + x0) + level[..., y0, x1] * (sx - x0)
            low = level[..., y1, x0] * (1 - sx + x0) + level[..., y1, x1] * (sx - x0)
            out[..., y, x] = top * (1 - sy + y0) + low * (sy - y0)
    return out


def test_patch_features_literally():
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=shape) for shape in ((2, 3, 8, 6), (2, 5, 4, 3), (2, 2, 3, 5))]
    pooled = [np.stack([literal_pool(image) for image in level]) for level in levels]
    expected = np.concatenate([pooled[0], *(literal_resize(x, 8, 6) for x in pooled[1:])], 1)
    found = patch_features([torch.from_numpy(x) for x in levels]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "p", "squared"),
    [
        ("point", 2, True),
        ("point", 2, False),
        ("shell", 1, True),
        ("shell", 2, True),
        ("shell", "inf", True),
        ("shell", float("inf"), True),
        ("zero", 2, True),
    ],
)
def test_distance_literally(target, p, squared):
    images = make_images()
    options: dict[str, Any] = {"target": target, "p": p, "squared": squared, "norm": 0.3, "dim": 7}
    model = fitted(NormOCC, images, **options, residual=0.5, precision="32")
    phi = patches(images)
    phi = phi / np.sqrt(np.linalg.eigvalsh(moments(phi)[0])[-1])
    w0 = model.project.weight.detach().double().numpy()[:, :, 0, 0]
    assert w0.shape == (7, 5)
    order = float(p) if target == "shell" else 2
    r0 = np.mean([np.linalg.norm(w0 @ x, order) for x in phi])
    m = 0.3 * r0
    assert float(model.radius) == pytest.approx(m, rel=1e-5)
    power = 1 if squared else 2  # the loss of a distance that is not squared is the square of its mean
    assert float(model.loss_before) == pytest.approx(maps_of(model, images).mean() ** power, rel=1e-5)

    with torch.no_grad():  # as if trained: r₀ and m stay those of the beginning
        model.project.weight += 0.1 * torch.randn_like(model.project.weight)
    w = model.project.weight.detach().double().numpy()[:, :, 0, 0]
    c = m * model.direction.double().numpy()
    if target == "shell":
        expected = [abs(np.linalg.norm(w @ x, order) - m) ** 2 for x in phi]
    elif target == "zero":
        expected = [np.sum((w @ x) ** 2) for x in phi]
    else:
        expected = [np.sum((w @ x - c) ** 2) ** (1 if squared else 0.5) for x in phi]
    found = maps_of(model, images)
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (IMAGES, SIDE, SIDE)
    loss = model.loss(next(batches(images, IMAGES)))
    assert loss.item() == pytest.approx(np.mean(expected) ** power, rel=1e-5)
    loss.backward()
    gradient = model.project.weight.grad.clone()
    model.project.weight.grad = None
    model.precision = "bf16"
    low = model.loss(next(batches(images, IMAGES)))
    low.backward()
    assert low.item() == pytest.approx(loss.item(), rel=0.01)
    assert (model.project.weight.grad - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("method", [NormOCC, NormOCCClosedForm])
def test_a_global_feature_is_the_mean_of_each_level(method):
    """One score per image: the literal formula on the means over all positions, in float64."""
    images, other = make_images(), make_images(1)
    model = fitted(method, images, norm=0.3, global_feature=True, precision="32")

    def phi(images):
        return np.concatenate([level.double().numpy().mean((2, 3)) for level in ChannelLevels()(images)], 1)

    s, mu = moments(phi(images))
    values, axes = np.linalg.eigh(s)
    if method is NormOCC:
        w = model.project.weight.detach().double().numpy()[:, :, 0, 0] / np.sqrt(values[-1])
        c = 0.3 * np.mean(np.linalg.norm(phi(images) @ w.T, axis=1)) * model.direction.double().numpy()
        expected = np.sum((phi(other) @ w.T - c) ** 2, 1)
    else:
        decay = axes @ np.diag(np.exp(-descent_time(torch.from_numpy(values), 0.01) * values)) @ axes.T
        solved = np.linalg.solve(s, mu - decay @ mu)
        expected = np.sum((phi(other) @ decay) ** 2, 1) + 0.09 * np.trace(s) * (1 - phi(other) @ solved) ** 2
    found = maps_of(model, other)
    assert found.shape == (IMAGES, 1, 1)
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=1e-4)
    assert any("its map is constant" in note for note in model.notes())


def test_projection_of_each_level_on_its_own_grid():
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8, 6), (2, 5, 4, 3), (2, 2, 3, 5))
    levels = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(7, 10, 1, 1, generator=rng, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(patch_features(levels), weight)
    torch.testing.assert_close(projection(weight, levels), expected)
    c = torch.randn(7, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(projection(weight, levels, c), expected - c[:, None, None])


def test_the_point_target_is_a_seeded_direction():
    images = make_images()
    same, again = (fitted(NormOCC, images) for _ in range(2))
    assert torch.equal(same.direction, again.direction)
    assert float(same.direction.norm()) == pytest.approx(1, rel=1e-6)
    assert torch.equal(same.radius, again.radius)
    assert not torch.equal(same.direction, NormOCC(backbone=ChannelLevels()).direction)


def test_the_radius_is_kept_once_it_is_known():
    images = make_images()
    model = fitted(NormOCC, images, norm=0.3)
    radius = model.radius.clone()
    with torch.no_grad():
        model.project.weight *= 2
    model.on_fit_start()
    assert torch.equal(model.radius, radius)


def test_the_radius_does_not_depend_on_the_batch_size():
    images = make_images()
    radii = [float(fitted(NormOCC, images, size=size).radius) for size in (1, 5, IMAGES)]
    assert radii == pytest.approx([radii[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("size", [4, 5])
def test_training_ends_with_the_epoch_whose_loss_is_small_enough(size):
    """Gradient descent in float64 by hand, with the mean loss of each epoch's batches."""
    images = make_images()
    model = fitted(NormOCC, images, residual=0.1, norm=0.3, precision="32")
    parts = list(batches(images, size))
    model.trainer.datamodule.batches_per_epoch = len(parts)
    model.trainer.strategy.reduce = lambda x, reduce_op: x
    model.trainer.global_step = 0
    w = model.project.weight.detach().double().numpy()[:, :, 0, 0]
    c = float(model.radius) * model.direction.double().numpy()
    scale = np.linalg.eigvalsh(moments(patches(images))[0])[-1] ** -0.5
    before = np.mean(np.sum((scale * patches(images) @ w.T - c) ** 2, 1))
    optimizer, velocity = descent([model.project.weight], lr=0.1), np.zeros_like(w)
    for _ in range(50):
        losses = []
        for batch in parts:
            phi = scale * patches(batch["image"])
            away = phi @ w.T - c
            losses.append(np.mean(np.sum(away**2, 1)))
            velocity = 0.9 * velocity + 2 * away.T @ phi / len(phi)
            w = w - 0.1 * velocity
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            optimizer.step()
            model.trainer.global_step += 1
        assert model.stopped_early == (np.mean(losses) <= 0.1 * before)
        if model.stopped_early:
            break
    assert model.stopped_early
    assert model.trainer.global_step > len(parts)  # not at once
    np.testing.assert_allclose(model.project.weight.detach().numpy()[:, :, 0, 0], w, atol=1e-5)
    model.stopped_early, model.steps = False, 50
    assert model.notes() == []  # of a stored run, which is tested without a fit
    model.on_fit_start()  # of a resumed run
    assert model.stopped_early
    model.ended = torch.tensor(False)
    assert model.notes() == ["the budget ended before the loss fell to method.residual=0.1 of that before training"]


def test_zero_collapses_and_a_norm_does_not():
    """The infeasible norm: trained to convergence, the scores of any patches are 0."""
    images = make_images()
    left = {}
    for target in ("zero", "point"):
        model = fitted(NormOCC, images, target=target, norm=1.0)
        optimizer = torch.optim.Adam(model.project.parameters(), 0.1)
        for _ in range(100):
            optimizer.zero_grad()
            model.training_step(next(batches(images, IMAGES)), 0).backward()
            optimizer.step()
        left[target] = maps_of(model, make_images(1)).mean()
    assert left["zero"] < 1e-3 * left["point"]


def test_a_collapsed_projection_has_a_gradient():
    """Squares of numbers below 1e-23 are 0 in float32, and a square root has no gradient there."""
    model = fitted(NormOCC, make_images(), target="zero", squared=False, precision="32")
    model.project.weight.data.mul_(1e-30)
    model.loss(next(batches(make_images(), IMAGES))).backward()
    assert model.project.weight.grad.isfinite().all()


def moments(phi):
    return phi.T @ phi / len(phi), phi.mean(0)


def energy_left(tau, s):
    """E‖Aφ‖² / E‖φ‖² with A = e^(−τS)."""
    values = np.linalg.eigvalsh(s)
    return np.sum(values * np.exp(-2 * tau * values)) / values.sum()


@pytest.mark.parametrize("residual", [0.9, 0.1, 0.01, 1e-4])
def test_descent_time_by_its_definition(residual):
    energy = torch.from_numpy(np.random.default_rng(0).exponential(size=40) ** 3)
    tau = descent_time(energy, residual)
    assert energy_left(tau, np.diag(energy.numpy())) == pytest.approx(residual, rel=1e-9)
    scaled = descent_time(1e-6 * energy, residual)  # free of units
    assert scaled == pytest.approx(1e6 * tau, rel=1e-9)


@pytest.mark.parametrize("norm", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("residual", [0.3, 0.01])
def test_closed_form_is_gradient_descent_in_the_mean_over_beginnings(norm, residual):
    """W_{t+1} = W_t − η∇E‖Wφ − c‖², iterated from the W₀ whose distances add up to the exact mean over W₀.

    Descent is affine in W₀: W_t = W₀M + W_t(0), with M = W_t(I) − W_t(0). For a W₀ whose entries are independent with
    mean 0 and variance 1/D, E‖W₀v‖² = ‖v‖², so the score's mean over W₀ is ‖Mφ‖² + ‖W_t(0)φ − c‖².
    """
    images, other = make_images(), make_images(1)
    model = fitted(NormOCCClosedForm, images, norm=norm, residual=residual)
    phi, new = patches(images), patches(other)
    s, mu = moments(phi)
    size = len(s)
    radius2 = norm**2 * np.mean(np.sum(phi**2, 1))
    c = np.random.default_rng(5).normal(size=size)
    c *= np.sqrt(radius2) / np.linalg.norm(c)

    eta = 2e-4 / np.linalg.eigvalsh(s)[-1]  # small steps: (I − 2ηS)^t is e^(−2ηtS) up to O(η)
    tau, left = 0.0, 1.0
    zero, unit = np.zeros((size, size)), np.eye(size)
    while left > residual:
        zero = zero - eta * 2 * (zero @ s - np.outer(c, mu))
        unit = unit - eta * 2 * (unit @ s - np.outer(c, mu))
        tau += 2 * eta
        left = energy_left(tau, s)
    mean = np.sum((new @ (unit - zero).T) ** 2, 1) + np.sum((new @ zero.T - c) ** 2, 1)
    found = maps_of(model, other).reshape(-1)
    np.testing.assert_allclose(found, mean, rtol=2e-3)


def test_at_convergence_direction_and_norm_drop_out():
    images, other = make_images(), make_images(1)
    phi, new = patches(images), patches(other)
    s, mu = moments(phi)
    expected = (1 - new @ np.linalg.solve(s, mu)) ** 2
    for norm in (0.5, 2.0):
        model = fitted(NormOCCClosedForm, images, norm=norm, residual=1e-30)
        radius2 = norm**2 * np.mean(np.sum(phi**2, 1))
        np.testing.assert_allclose(maps_of(model, other).reshape(-1) / radius2, expected, rtol=1e-3, atol=1e-4)


def test_without_a_norm_the_closed_form_is_the_soft_minor_subspace():
    images, other = make_images(), make_images(1)
    model = fitted(NormOCCClosedForm, images, norm=0.0, residual=0.05)
    phi, new = patches(images), patches(other)
    values, axes = np.linalg.eigh(moments(phi)[0])
    decay = axes @ np.diag(np.exp(-descent_time(torch.from_numpy(values), 0.05) * values)) @ axes.T
    np.testing.assert_allclose(maps_of(model, other).reshape(-1), np.sum((new @ decay) ** 2, 1), rtol=1e-4)


def test_closed_form_with_directions_that_never_occur():
    """Fewer patches than channels, or a channel that is always 0: no division by its vanishing energy."""
    images = make_images()
    images[:, 1] = 0
    model = fitted(NormOCCClosedForm, images, norm=1.0, residual=0.01)
    other = make_images(1)
    found = maps_of(model, other)
    assert np.isfinite(found).all()
    clean = other.clone()
    clean[:, 1] = 0
    unused = patches(other)[:, 1] ** 2  # what was never seen is kept whole
    np.testing.assert_allclose(found.reshape(-1) - maps_of(model, clean).reshape(-1), unused, rtol=1e-3, atol=1e-4)


def test_folds_score_training_images_by_models_of_the_others():
    """Beside models that are fitted to the images of the other folds only."""
    images = make_images()
    model = fitted(NormOCCClosedForm, images, size=5, folds=3)
    np.testing.assert_allclose(maps_of(model, images), maps_of(fitted(NormOCCClosedForm, images), images), rtol=1e-4)
    batch = {"image": images, "index": torch.arange(IMAGES), "is_train_image": True}
    found = model.anomaly_map(batch)
    for part in range(3):
        chosen = torch.arange(IMAGES) % 3 == part
        others = fitted(NormOCCClosedForm, images[~chosen])
        np.testing.assert_allclose(found[chosen], maps_of(others, images[chosen]), rtol=1e-4)
    with pytest.raises(UserError, match=r"method\.folds=13: more folds than training images"):
        fitted(NormOCCClosedForm, images, folds=13)


def test_closed_form_does_not_depend_on_the_batch_size():
    images, other = make_images(), make_images(1)
    found = [maps_of(fitted(NormOCCClosedForm, images, size=size), other) for size in (1, 5, IMAGES)]
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-5)


@pytest.mark.parametrize("target", ["point", "zero"])
def test_a_distance_that_is_not_squared_is_learned_with_the_default_rate(target):
    """Its own gradient does not vanish with it: steps of one length would go past the minimum again and again."""
    images = make_images()
    model = fitted(NormOCC, images, target=target, squared=False, precision="32")
    optimizer, batch = descent(model.project.parameters(), lr=0.5), next(batches(images, IMAGES))
    before, distances = model.distance(batch).mean().item(), []
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        distances.append(model.distance(batch).mean().item())
    assert max(distances[-20:]) < 0.1 * before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (NormOCC, {"target": "sphere"}, "method.target=sphere"),
        (NormOCC, {"p": 3}, "method.p=3: choose 1, 2 or inf$"),
        (NormOCC, {"norm": -1}, "method.norm=-1: give a number from 0$"),
        (NormOCC, {"dim": 0}, "method.dim=0: give a whole number from 1"),
        (NormOCC, {"residual": 1}, "method.residual=1: give a share"),
        (NormOCCClosedForm, {"residual": 0}, "method.residual=0"),
        (NormOCCClosedForm, {"norm": -1}, "method.norm=-1"),
    ],
)
def test_options_that_mean_nothing(method, options, message):
    with pytest.raises(UserError, match=message):
        method(backbone=ChannelLevels(), **options)
