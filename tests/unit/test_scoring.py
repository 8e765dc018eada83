import numpy as np
import pytest
import torch
from scipy import ndimage

from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.scoring import image_scores, smooth


@pytest.fixture(scope="module")
def maps():
    return np.random.default_rng(0).exponential(size=(5, 50, 37))


def on_each(maps, function):
    return np.stack([function(x) for x in maps])


def smoothed(maps, how):
    return smooth(torch.from_numpy(maps), how).numpy()


@pytest.mark.parametrize("sigma", [0.7, 2, 4])
def test_gaussian_is_scipys(maps, sigma):
    expected = on_each(maps, lambda x: ndimage.gaussian_filter(x, sigma, mode="reflect", truncate=4))
    np.testing.assert_allclose(smoothed(maps, sigma), expected, rtol=1e-12)
    np.testing.assert_allclose(smoothed(maps, {"sigma": sigma}), expected, rtol=1e-12)
    np.testing.assert_allclose(smoothed(maps.astype(np.float32), sigma), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 20), (16, 16), (33, 5)])
def test_maps_smaller_than_the_kernel(shape):
    maps = np.random.default_rng(1).normal(size=(2, *shape))
    expected = on_each(maps, lambda x: ndimage.gaussian_filter(x, 4))
    np.testing.assert_allclose(smoothed(maps, 4), expected, rtol=0, atol=1e-14)


def test_gaussian_cut_to_five_taps(maps):
    expected = on_each(maps, lambda x: ndimage.gaussian_filter(x, 4, radius=2))
    np.testing.assert_allclose(smoothed(maps, {"sigma": 4, "size": 5}), expected, rtol=1e-12)


def test_gaussian_with_zeros_beyond_the_borders(maps):
    """By scipy, and on a constant map: five nearly equal taps of which three lie inside at an edge."""
    expected = on_each(maps, lambda x: ndimage.gaussian_filter(x, 4, radius=2, mode="constant"))
    np.testing.assert_allclose(smoothed(maps, {"sigma": 4, "size": 5, "pad": "zeros"}), expected, rtol=1e-12)
    ones = smoothed(np.ones((1, 30, 30)), {"sigma": 4, "size": 5, "pad": "zeros"})[0]
    assert (ones[0, 0], ones[0, 15], ones[15, 15]) == pytest.approx((0.36, 0.6, 1), abs=0.02)


@pytest.mark.parametrize("times", [1, 3])
def test_box_is_scipys_uniform_filter(maps, times):
    expected = maps
    for _ in range(times):
        expected = on_each(expected, lambda x: ndimage.uniform_filter(x, 11, mode="reflect"))
    np.testing.assert_allclose(smoothed(maps, {"box": 11, "times": times}), expected, rtol=1e-12)


def test_no_smoothing_and_constant_maps():
    maps = torch.full((2, 9, 9), 0.3)
    assert smooth(maps, None) is maps
    torch.testing.assert_close(smooth(maps, 4), maps)


def test_smoothing_has_gradients():
    """For a method that smooths inside its loss."""
    maps = torch.rand(2, 6, 6, dtype=torch.float64, requires_grad=True)
    smooth(maps, 1).sum().backward()
    torch.testing.assert_close(maps.grad, torch.ones_like(maps))  # mirrored borders lose nothing


def test_image_scores_are_numpys(maps):
    flat = maps.reshape(len(maps), -1)
    tensor = torch.from_numpy(maps)
    np.testing.assert_array_equal(image_scores(tensor, "max").numpy(), flat.max(1))
    np.testing.assert_allclose(image_scores(tensor, "mean").numpy(), flat.mean(1), rtol=1e-12)
    for share in (0.01, 0.1, 1.0):
        count = int(share * flat.shape[1])
        expected = np.sort(flat, 1)[:, -count:].mean(1)
        np.testing.assert_allclose(image_scores(tensor, share).numpy(), expected, rtol=1e-12)


def test_a_tiny_share_is_one_pixel(maps):
    tensor = torch.from_numpy(maps)
    assert torch.equal(image_scores(tensor, 1e-9), image_scores(tensor, "max"))


@pytest.mark.parametrize("how", [4, {"sigma": 4, "size": 5}, {"box": 11, "times": 3}])
@pytest.mark.parametrize("side", [64, 256])
def test_batch_size_and_threads_change_no_bit(how, side, threads):
    maps = torch.rand(9, side, side, generator=torch.Generator().manual_seed(0))
    whole = smooth(maps, how)
    for count in (1, 2, 3):
        threads(count)
        for size in (1, 2, 4):
            assert torch.equal(torch.cat([smooth(part, how) for part in maps.split(size)]), whole)


@pytest.mark.parametrize("how", ["max", "mean", 0.01, 0.7])
def test_batch_size_and_threads_change_no_bit_of_a_score(how, threads):
    maps = torch.rand(9, 256, 256, generator=torch.Generator().manual_seed(0))
    whole = image_scores(maps, how)
    for count in (1, 2, 3):
        threads(count)
        for size in (1, 2, 9):
            assert torch.equal(torch.cat([image_scores(part, how) for part in maps.split(size)]), whole)


@pytest.fixture
def threads():
    """Sets the number of torch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_autocast_rounds_no_score(maps):
    """Under hardware.precision=bf16 the whole test runs in an autocast context."""

    class Given(AnomalyModule):
        uses_backbone = False

        def anomaly_map(self, batch):
            return torch.from_numpy(maps).float()

    model = Given(image_size=(50, 37), scoring={"pixel_smooth": 4})
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict_step({}, 0)
    for key, expected in model.score({}).items():
        assert torch.equal(found[key], expected)


@pytest.mark.parametrize("how", [2, {"sigma": 2, "pad": "zeros"}, {"box": 5, "times": 2}])
def test_large_maps_are_smoothed_in_parts(how, monkeypatch):
    maps = torch.rand(2, 19, 23)
    whole = smooth(maps, how)
    monkeypatch.setattr("anomalib_lite.methods.scoring.PIXELS", 70)
    assert smooth(maps, how).numpy() == pytest.approx(whole.numpy(), rel=1e-6)
