import pickle
import time
from itertools import product

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.tiling import Tiling
from anomalib_lite.data.transforms import Resize, Tile, Turn
from anomalib_lite.errors import UserError


def noise(side=1024):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def scene():
    """Smooth shading, sharp edges and fine texture, as in a photograph of a part."""
    picture = Image.radial_gradient("L").resize((1024, 900)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for i in range(40):
        draw.ellipse((i * 23, i * 17, i * 23 + 90, i * 17 + 140), outline=(i * 6, 200 - i * 5, 90), width=1 + i % 5)
    grain = np.random.default_rng(1).normal(0, 6, (900, 1024, 3))
    shaded = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7))) + grain
    return np.clip(shaded, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("picture", [noise(), scene()], ids=["noise", "scene"])
@pytest.mark.parametrize(("size", "resample"), [(256, "bilinear"), ([224, 320], "lanczos"), (1100, "bicubic")])
def test_resize_equals_pil(picture, size, resample):
    mask = picture[..., 0] > 250
    height, width = (size, size) if isinstance(size, int) else size
    wanted = Image.fromarray(picture).resize((width, height), Image.Resampling[resample.upper()])
    wanted_mask = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    image, small_mask = Pipeline([Resize(size, resample)], normalize="none")(picture, mask)
    assert image.dtype == torch.float32
    assert small_mask.dtype == torch.bool
    assert ((image * 255).round().byte().permute(1, 2, 0).numpy() == np.asarray(wanted)).all()
    assert (small_mask.numpy() == (np.asarray(wanted_mask) > 0)).all()


def test_albumentations_own_resize_differs():
    """The reason for ours; if this fails it may go."""
    assert (A.Resize(256, 256)(image=noise())["image"] != Resize(256)(image=noise())["image"]).any()


def test_normalisation():
    picture = noise(16)
    plain, _ = Pipeline([], normalize="none")(picture, np.zeros((16, 16), bool))
    normal, _ = Pipeline([])(picture, np.zeros((16, 16), bool))
    assert plain.min() >= 0
    assert plain.max() <= 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(normal, (plain - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert normal.is_contiguous()


def test_centre_crop_takes_image_and_mask():
    mask = np.zeros((64, 64), bool)
    mask[0, 0] = mask[32, 32] = True
    image, cropped = Pipeline([Resize(64), A.CenterCrop(32, 32)])(noise(64), mask)
    assert image.shape == (3, 32, 32)
    assert cropped.nonzero().tolist() == [[16, 16]]


def augmented(pipeline, *seed):
    return pipeline(noise(32), np.zeros((32, 32), bool), seed)[0]


def test_augmentation_follows_its_seed():
    pipeline = Pipeline(
        [Resize(32)], [A.HorizontalFlip(p=0.5), A.OneOf([A.GaussNoise(p=1), A.ColorJitter(p=1)], p=0.9)]
    )
    first = [augmented(pipeline, 0, e, i) for e in range(3) for i in range(4)]
    again = [augmented(pipeline, 0, e, i) for e in range(3) for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    copy = pickle.loads(pickle.dumps(pipeline))  # as a worker process started by spawn has it
    assert torch.equal(augmented(copy, 0, 2, 3), first[-1])
    assert sum(torch.equal(a, b) for n, a in enumerate(first) for b in first[:n]) < 3
    assert not torch.equal(augmented(pipeline, 1, 0, 0), first[0])


def test_transforms_of_one_sample_are_independent():
    """albumentations' set_random_seed gives each its own generator of the same seed: two flips would always agree."""
    pipeline = Pipeline([], [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], "none")
    corner = np.zeros((2, 2, 3), np.uint8)
    corner[0, 0] = 255
    mask = np.zeros((2, 2), bool)
    places = [int(pipeline(corner, mask, (0, i))[0][0].argmax()) for i in range(200)]
    assert min(places.count(place) for place in range(4)) > 25


def turned(turn, copy, index=0, seed=0, side=32):
    """Image uint8 [H, W, 3] and mask of a copy of a training image."""
    mask = np.zeros((side, side), bool)
    mask[3, 9] = True
    return Pipeline([], [turn]).transform(noise(side), mask, (seed, 0, copy, index))


def test_multiples_of_an_angle_follow_each_other():
    for copy in range(6):
        for index in range(3):
            image, mask = turned(Turn(step=90), copy, index)
            assert (image == np.rot90(noise(32), copy + index)).all()
            assert mask.nonzero() == np.rot90(turned(Turn(step=90), 0)[1], copy + index).nonzero()
    eight = [turned(Turn(step=45), copy)[0] for copy in range(9)]
    assert len({image.tobytes() for image in eight}) == 8
    assert (eight[8] == eight[0]).all()
    for copy in (1, 3):  # against PIL, within the circle that no corner enters
        other = np.asarray(Image.fromarray(noise(32)).rotate(45 * copy, Image.Resampling.BILINEAR)).astype(int)
        y, x = np.ogrid[-15.5:16, -15.5:16]
        difference = np.abs(eight[copy].astype(int) - other)[np.hypot(y, x) < 14]
        assert difference.mean() < 4


def test_random_angles_leave_the_first_copy():
    turn = Turn(angles=[0, 345], mirror=False)
    copies = [turned(turn, copy)[0] for copy in range(31)]
    assert (copies[0] == noise(32)).all()
    assert len({image.tobytes() for image in copies}) == 31
    assert (copies[7] == turned(turn, 7)[0]).all()
    assert (copies[7] != turned(turn, 7, index=1)[0]).any()
    assert (copies[7] != turned(turn, 7, seed=1)[0]).any()
    black = [(image[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all() for image in copies]
    assert sum(black) > 20
    assert not any((turned(Turn(angles=[40, 50]), copy)[0] == 0).all(-1).any() for copy in range(1, 9))


def test_every_tile_is_turned_by_every_angle():
    """Of four tiles, four copies in a row have one angle, and the first four of random angles none. In training the
    angle follows the epochs, of which the first alone has no random angle.
    """
    tile = Tile((16, 16), Tiling(16).places)
    tiles = {noise(32)[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16)}
    for all_tiles, turn in product((True, False), (Turn(step=90), Turn(angles=[10, 350]))):
        pipeline, mask = Pipeline([tile], [turn]), np.zeros((32, 32), bool)
        made = [pipeline.transform(noise(32), mask, (0, 0, k, 0), all_tiles=all_tiles)[0].tobytes() for k in range(16)]
        assert [image in tiles for image in made[:4]] == [True, *[all_tiles] * 3]
        assert len(set(made)) == 16


def test_seeding_is_fast():
    pipeline = Pipeline([], [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], "none")
    picture, mask = noise(8), np.zeros((8, 8), bool)
    start = time.process_time()
    for i in range(200):
        pipeline(picture, mask, (0, 0, i))
    assert (time.process_time() - start) / 200 < 1e-3  # about 0.1 ms; the bound only catches a change of its order


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resize(256, "blinear"), "data.resample=blinear is not known: choose one of nearest, "),
        (lambda: Resize(0), "data.image_size=0 must be"),
        (lambda: Resize([1, 2, 3]), "data.image_size="),
        (lambda: Pipeline([], normalize="image"), "data.normalize=image is not known: choose one of imagenet, none"),
        (
            lambda: augmented(Pipeline([A.Normalize()]), 0),
            "must leave a uint8 image .*leave normalisation to data.normalize",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()
