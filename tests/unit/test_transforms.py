import pickle
import time

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from anomalib_lite.data.transforms import Pipeline, Resize
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


def test_corruption_comes_after_the_transforms():
    def corrupt(image):
        assert image.shape == (8, 8, 3)
        return image, np.ones((8, 8), bool)

    _, mask = Pipeline([Resize(16), A.CenterCrop(8, 8)])(noise(32), np.zeros((32, 32), bool), corrupt=corrupt)
    assert mask.all()


def test_seeding_is_fast():
    pipeline = Pipeline([], [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], "none")
    picture, mask = noise(8), np.zeros((8, 8), bool)
    start = time.perf_counter()
    for i in range(200):
        pipeline(picture, mask, (0, 0, i))
    assert (time.perf_counter() - start) / 200 < 3e-3  # about 0.1 ms; the bound only catches a change of its order


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
