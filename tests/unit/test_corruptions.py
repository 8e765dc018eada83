"""The corruptions that the autoencoder learns to undo: what each kind may change, and how much."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalib_lite.data import corruptions
from anomalib_lite.data.corruptions import CONTENTS, SHAPES, corrupt
from anomalib_lite.errors import UserError
from tests.helpers.image_trees import save_image


def smooth(height: int = 96, width: int = 128) -> np.ndarray:
    """A colourful image without a flat place."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Textures of one colour each, larger and smaller than the image."""
    root = tmp_path_factory.mktemp("textures")
    for name, colour, shape in (("a/red", (255, 0, 0), (300, 200)), ("b/green", (0, 255, 0), (20, 30))):
        (root / name).parent.mkdir()
        cv2.imwrite(str(root / f"{name}.png"), np.full((*shape, 3), colour[::-1], np.uint8))
    (root / "notes.txt").write_text("no image")
    return root


def test_share_of_clean_images():
    image = smooth(32, 32)
    clean = [not corrupt(image, np.random.default_rng(seed), p_clean=0.25)[1].any() for seed in range(400)]
    assert 0.17 < np.mean(clean) < 0.33  # 3.5 standard deviations
    result, mask = corrupt(image, np.random.default_rng(0), p_clean=1.0)
    assert result is not image
    assert not mask.any()
    np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize("shape", [(256, 256), (96, 160)])
def test_the_mask_is_what_changed_and_has_the_area(shape):
    image, areas = smooth(*shape), []
    before, results = image.copy(), []
    for seed in (*range(60), 0):
        result, mask = corrupt(image, np.random.default_rng(seed))
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(mask, (result != image).any(-1))
        areas.append(mask.mean())
        results.append(result)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(results[0], results[60])
    assert (results[0] != results[1]).any()
    assert 0.005 <= min(areas) < 0.03
    assert 0.06 < max(areas) <= 0.2


def test_what_is_inside_a_shape_is_a_blend(folder):
    """β · image + (1 − β) · texture with β in [0, max_beta], one β a shape."""
    image = smooth()
    seen = []
    for seed in range(40):
        result, mask = corrupt(
            image, np.random.default_rng(seed), shapes={"rectangle": 1.0}, contents={"texture": 1.0},
            max_shapes=1, max_beta=0.5, textures=folder,
        )  # fmt: skip
        x, y = image[mask].astype(float), result[mask].astype(float)
        fits = []
        for colour in ((255, 0, 0), (0, 255, 0)):
            difference = np.array(colour) - x
            beta = 1 - ((y - x) * difference).sum() / (difference**2).sum()
            fits.append((np.abs(x + (1 - beta) * difference - y).max(), beta))
        error, beta = min(fits)
        assert error < 0.6  # rounding
        seen.append((beta, int(np.argmin([fit[0] for fit in fits]))))
    betas, colours = np.array(seen).T
    assert betas.min() > -0.01
    assert 0.4 < betas.max() < 0.51
    assert 5 < colours.sum() < 35  # both textures


def test_textures_are_parts_of_the_folders_images(tmp_path):
    """At their own scale where they are large enough."""
    texture = np.random.default_rng(1).integers(0, 256, (200, 250, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "t.png"), texture[..., ::-1])
    image = np.full((60, 80, 3), 128, np.uint8)
    result, mask = corrupt(
        image, np.random.default_rng(3), shapes={"rectangle": 1.0}, contents={"texture": 1.0}, max_shapes=1,
        max_beta=0.0, textures=tmp_path,
    )  # fmt: skip
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    part = result[y : y + height, x : x + width]
    assert cv2.matchTemplate(texture, part, cv2.TM_SQDIFF).min() < 1


@pytest.mark.parametrize("kind", ["elsewhere", "elastic", "blur"])
def test_contents_out_of_the_image_bring_no_new_colours(kind):
    image = smooth()
    image[..., 2] = 0
    for seed in range(10):
        result, _ = corrupt(image, np.random.default_rng(seed), contents={kind: 1.0})
        assert not result[..., 2].any()
        assert result.min() >= image.min()
        assert result.max() <= image.max()


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_content_does_not_depend_on_how_it_is_cut_out(kind):
    """Computed in a box only, it is what it would be in the whole image."""
    if kind == "texture":
        pytest.skip("speckles are drawn pixel by pixel, in the box's order")
    image, box = smooth(), (slice(20, 50), slice(64, 101))
    whole = (slice(0, 96), slice(0, 128))
    make = corruptions._CONTENTS[kind]
    part = np.asarray(make(image, np.random.default_rng(5), box), np.float32)
    full = np.asarray(make(image, np.random.default_rng(5), whole), np.float32)
    np.testing.assert_allclose(part, full[box], atol=1.01)  # cv2's 8-bit filters round in blocks


def test_elastic_moves_no_further_than_its_reach():
    """Displacements stay below 8 % of the side times the noise's range."""
    y, _ = np.indices((100, 100), np.uint8)
    image = np.repeat(2 * y[..., None], 3, -1)  # the value tells the row
    for seed in range(20):
        moved = corruptions._elastic(image, np.random.default_rng(seed), (slice(20, 80), slice(20, 80)))
        assert np.abs(moved.astype(int) - image[20:80, 20:80]).max() <= 2 * 0.08 * 100 * 1.5


def test_perlin_noise_is_smooth_zero_on_its_grid_and_bounded():
    for seed in range(10):
        noise = corruptions._perlin(128, 64, np.random.default_rng(seed))
        assert noise.shape == (128, 64)
        assert 0.3 < np.abs(noise).max() < 1.1
        np.testing.assert_allclose(noise[::64, ::32], 0, atol=1e-6)  # of 2 to 32 cells, all have these corners
        box = (slice(7, 33), slice(40, 64))
        part = corruptions._perlin(128, 64, np.random.default_rng(seed), box)
        np.testing.assert_allclose(part, noise[box], atol=1e-6)


def test_flat_images_get_what_they_can_show():
    """A flat patch looks the same when deformed: after a while any content may come."""
    chosen = [{"contents": {kind: 1.0}} for kind in ("elastic", "elsewhere", "blur")]
    for options in chosen + [{"shapes": {kind: 1.0}} for kind in SHAPES]:
        for level in (0, 90, 255):
            flat = np.full((64, 48, 3), level, np.uint8)
            assert corrupt(flat, np.random.default_rng(0), **options)[1].any()  # type: ignore[arg-type]


def test_kinds_can_be_chosen_and_mistakes_are_named(folder, tmp_path):
    image = smooth()
    for kind in SHAPES:
        assert corrupt(image, np.random.default_rng(0), shapes={kind: 1.0}, area=(0.001, 0.5))[1].any()
    for kind in CONTENTS:
        assert corrupt(image, np.random.default_rng(0), contents={kind: 1.0}, area=(0.002, 0.3))[1].any()
    for options, message in (
        ({"shapes": {"star": 1.0}}, r"data\.corrupt\.shapes=.*stain, perlin"),
        ({"contents": {"elastic": -1.0}}, r"data\.corrupt\.contents"),
        ({"contents": {"elastic": 0.0}}, "above 0"),
        ({"contents": {"texture": 1.0}, "textures": tmp_path / "none"}, r"data\.corrupt\.textures=.*none"),
    ):
        with pytest.raises(UserError, match=message):
            corrupt(image, np.random.default_rng(0), **options)
    save_image(tmp_path / "full" / "x.png")
    assert corrupt(image, np.random.default_rng(0), textures=tmp_path / "full")[1].any()
