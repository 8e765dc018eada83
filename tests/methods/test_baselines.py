"""The baselines without training, and reverse distillation, each against a literal reading in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods import rad
from anomalib_lite.methods.padim import PaDiM
from anomalib_lite.methods.patchcore import PatchCore
from anomalib_lite.methods.patches import patch_features
from anomalib_lite.methods.rad import RAD
from anomalib_lite.methods.rd4ad import RD4AD
from anomalib_lite.methods.subspace_ad import SubspaceAD
from tests.helpers.feature_levels import ChannelLevels

IMAGES, SIDE = 7, 4


CNN, VIT, CLASS = ((3, 2), (1,)), ((5, 5, 5), ()), ((5, 5), (), 2)  # CLASS: with a class token and a register token


def make_images(kind: Any, seed: int = 0, count: int = IMAGES) -> Tensor:
    """Correlated channels with a mean, [count, C, SIDE, SIDE]."""
    channels = sum(kind[0])
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(channels, channels)) * 0.5 ** np.arange(channels)
    images = np.einsum("dc,nchw->ndhw", mix, rng.normal(size=(count, channels, SIDE, SIDE)))
    return torch.from_numpy(images + 3).float()


def fitted(method: Any, kind: Any, images: Tensor, **options: Any) -> Any:
    """The method, fitted to batches of 3 images."""
    torch.manual_seed(0)
    model = method(backbone=ChannelLevels(*kind), image_size=(SIDE, SIDE), **options)
    parts = [images[i : i + 3] for i in range(0, len(images), 3)]
    index = torch.arange(len(images)).split(3)
    batches = [{"image": part, "index": at} for part, at in zip(parts, index, strict=True)]
    same = {"corrupt": None, "train_pipeline": None, "eval_pipeline": None}  # no augmentation
    data = SimpleNamespace(fit_dataloader=lambda: batches, train_samples=images, fit_keys=lambda: images, **same)
    model.trainer = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(lightning_module=model))
    model.transfer_batch_to_device = lambda batch, device, index: batch
    model.on_fit_start()
    return model.eval()


def scored(model: Any, images: Tensor, is_train_image: bool = False) -> np.ndarray:
    with torch.no_grad():
        batch = {"image": images, "index": torch.arange(len(images)), "is_train_image": is_train_image}
        found = model.anomaly_map(batch)
    assert found.dtype == torch.float32
    return found.numpy()


# --- SubspaceAD ---


def patches_of(kind: Any, images: Tensor) -> np.ndarray:
    """[N·h·w, C] in float64: the mean of a transformer's levels, a CNN's levels beside each other."""
    levels = ChannelLevels(*kind)(images.double())
    features = sum(levels) / len(levels) if kind is VIT else patch_features(levels)
    return features.movedim(1, -1).flatten(0, 2).numpy()


@pytest.mark.parametrize("kind", [CNN, VIT], ids=["cnn", "vit"])
@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99])
def test_subspace_ad_is_the_residual_of_a_pca(kind, variance):
    train, test = make_images(kind), make_images(kind, seed=1) + 0.5
    pca = PCA(variance, svd_solver="full").fit(patches_of(kind, train))
    x = patches_of(kind, test)
    expected = np.square(x - pca.inverse_transform(pca.transform(x))).sum(1).reshape(-1, SIDE, SIDE)
    assert 0 < pca.n_components_ < 5
    found = scored(fitted(SubspaceAD, kind, train, variance=variance), test)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_subspace_ad_scores_a_fold_by_the_others():
    images = make_images(CNN)
    model = fitted(SubspaceAD, CNN, images, folds=3)
    np.testing.assert_allclose(scored(model, images), scored(fitted(SubspaceAD, CNN, images), images), rtol=1e-4)
    found = scored(model, images, is_train_image=True)
    for fold in range(3):
        own = np.arange(IMAGES) % 3 == fold
        others = fitted(SubspaceAD, CNN, images[~own])
        np.testing.assert_allclose(found[own], scored(others, images[own]), rtol=1e-4)


# --- PaDiM ---


def mahalanobis(images: np.ndarray, x: np.ndarray, regularisation: float) -> float:
    """Of x [d] to the Gaussian of images [N, d], by equations 1 and 2."""
    covariance = regularisation * np.eye(len(x))
    if len(images) > 1:
        covariance += np.cov(images.T)
    offset = x - images.mean(0)
    return np.sqrt(offset @ np.linalg.inv(covariance) @ offset)


def embeddings(model: PaDiM, images: Tensor) -> np.ndarray:
    """The chosen channels at every position, [N, h, w, d] in float64; the second level is half as large."""
    first, second = (level.numpy() for level in ChannelLevels(*CNN)(images.double()))
    joined = np.empty((len(images), 5, SIDE, SIDE))
    for y in range(SIDE):
        for x in range(SIDE):
            joined[:, :, y, x] = np.concatenate([first[:, :, y, x], second[:, :, y // 2, x // 2]], 1)
    return joined[:, model.subset.numpy()].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("count", [1, 2, 3, IMAGES])
def test_padim_is_the_distance_to_a_gaussian_of_every_position(count):
    train, test = make_images(CNN, count=count), make_images(CNN, seed=1)
    model = fitted(PaDiM, CNN, train, dim=3, regularisation=0.02)
    assert len(set(model.subset.tolist())) == 3
    seen, new = embeddings(model, train), embeddings(model, test)
    found, own = scored(model, test), scored(model, train, is_train_image=True)
    for y in range(SIDE):
        for x in range(SIDE):
            expected = [mahalanobis(seen[:, y, x], each, 0.02) for each in new[:, y, x]]
            np.testing.assert_allclose(found[:, y, x], expected, rtol=1e-3)
            if count > 1:  # a training image is scored by the others, whose regularisation is larger
                larger = 0.02 * (count - 1) / max(count - 2, 1)
                rest = [np.delete(seen[:, y, x], i, 0) for i in range(count)]
                expected = [mahalanobis(others, seen[i, y, x], larger) for i, others in enumerate(rest)]
                np.testing.assert_allclose(own[:, y, x], expected, rtol=1e-3)


def test_padim_with_augmented_images_leaves_none_out():
    images = make_images(CNN)
    model = fitted(PaDiM, CNN, images, dim=3)
    model.fitted.zero_()
    np.testing.assert_array_equal(scored(model, images, is_train_image=True), scored(model, images))


# --- RAD ---


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def literal_rad(kind: Any, train: Tensor, images: Tensor, k: int, r: int, without: bool) -> np.ndarray:
    """Every image, position and neighbour in a loop, with patches of the bank rounded to bf16."""
    backbone = ChannelLevels(*kind)
    count = len(kind[0])

    def parts(image: Tensor) -> tuple[list[Tensor], np.ndarray]:
        outputs = [x[0] for x in backbone(image[None])]
        last = outputs[-1][:, 0, 0] if len(kind) == 3 else outputs[-1].mean((1, 2))
        return outputs[:count], unit(last.double().numpy())

    bank = [parts(image) for image in train]
    maps = []
    for number, image in enumerate(images):
        levels, descriptor = parts(image)
        others = [i for i in range(len(train)) if not (without and i == number)] or [number]
        nearest = sorted(others, key=lambda i: -float(descriptor @ bank[i][1]))[:k]
        heat = torch.zeros(SIDE, SIDE, dtype=torch.float64)
        for level, x in enumerate(levels):
            h, w = x.shape[1:]
            distances = torch.empty(h, w, dtype=torch.float64)
            for row in range(h):
                for column in range(w):
                    patch, cosines = unit(x[:, row, column].double().numpy()), []
                    for i in nearest:
                        for y in range(max(0, row - r), min(h, row + r + 1)):
                            for z in range(max(0, column - r), min(w, column + r + 1)):
                                stored = nn.functional.normalize(bank[i][0][level][:, y, z], dim=0).bfloat16()
                                cosines.append(patch @ stored.double().numpy())
                    distances[row, column] = 1 - max(cosines)
            heat += nn.functional.interpolate(distances[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
        maps.append(heat / count)
    return torch.stack(maps).numpy()


@pytest.mark.parametrize("is_train_image", [False, True])
@pytest.mark.parametrize(("kind", "k", "r"), [(CNN, 3, 1), (CLASS, 2, 0), (CLASS, 1, 2), (CLASS, 150, 1)])
def test_rad_is_the_brute_force(kind, k, r, is_train_image, monkeypatch):
    """Also in blocks of three rows of positions."""
    train = make_images(kind) - 3
    images = train if is_train_image else make_images(kind, seed=1) - 3
    model = fitted(RAD, kind, train, k=k, r=r)
    expected = literal_rad(kind, train, images, k, r, is_train_image)
    np.testing.assert_allclose(scored(model, images, is_train_image), expected, rtol=0, atol=2e-6)
    monkeypatch.setattr(rad, "LIMITS", (3 * 4 * SIDE * 5 * (IMAGES + IMAGES * (2 * r + 1) ** 2), 0))
    np.testing.assert_allclose(scored(model, images, is_train_image), expected, rtol=0, atol=2e-6)


def test_rad_with_one_image():
    """It has no other image to be compared with."""
    image = make_images(CLASS, count=1) - 3
    assert np.abs(scored(fitted(RAD, CLASS, image), image, is_train_image=True)).max() < 0.01


def test_rad_refuses_a_bank_that_does_not_fit(monkeypatch):
    images = make_images(CNN)
    size = IMAGES * 2 * (3 * 16 + 2 * 4)
    monkeypatch.setattr(rad, "free_memory", lambda device: size)
    assert sum(bank.nbytes for bank in fitted(RAD, CNN, images).banks) == size
    monkeypatch.setattr(rad, "free_memory", lambda device: size - 1)
    with pytest.raises(UserError, match=r"^method=rad: the bank of 7 training images needs 0\.0 GB.*give a smaller"):
        fitted(RAD, CNN, images)
    monkeypatch.undo()
    assert 2**20 < rad.free_memory(torch.device("cpu")) < 2**50
    for name, number in (("reserved", 50), ("allocated", 20)):  # what PyTorch has reserved and does not use is free too
        monkeypatch.setattr(f"torch.cuda.memory_{name}", lambda device, number=number: number)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    assert rad.free_memory(torch.device("cuda")) == 130


@pytest.mark.parametrize(("method", "part", "option"), [
    (PaDiM, "torch.zeros_like", r"method\.dim=3 .* give a smaller method\.dim"),
    (PatchCore, "anomalib_lite.methods.patchcore.PatchCore.picked", r"limit them by method\.max_patches"),
])  # fmt: skip
def test_a_closed_form_without_memory_names_its_option(method, part, option, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(part, full)
    with pytest.raises(UserError, match=f"^out of memory: .*{option}"):
        fitted(method, CNN, make_images(CNN), **{"dim": 3} if method is PaDiM else {})


@pytest.mark.parametrize("method", [SubspaceAD, PaDiM, RAD])
def test_bf16_rounds_no_distance(method):
    """Under hardware.precision=bf16 the whole test runs in an autocast context: cosines near 1 would be 1."""
    images = make_images(CNN)
    model = fitted(method, CNN, images, precision="bf16", **{"dim": 3} if method is PaDiM else {})
    batch = {"image": images, "index": torch.arange(IMAGES)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.predict_step(batch, 0)["map"]
    assert torch.equal(found, model.score(batch)["map"])


# --- RD4AD ---


def test_rd4ad_loss_and_map_are_cosines():
    torch.manual_seed(0)
    backbone = Backbone("test_resnet.r160_in1k", [1, 2, 3], "none", "32", [(32, 64)])
    model = RD4AD(backbone=backbone, image_size=(32, 64), precision="32").eval()
    batch = {"image": torch.randn(2, 3, 32, 64)}
    pairs = [(t.detach().double(), r.detach().double()) for t, r in model.pairs(batch)]
    assert all(t.shape == r.shape for t, r in pairs)
    losses, maps = [], []
    for image in range(2):
        total, heat = 0.0, torch.zeros(32, 64, dtype=torch.float64)
        for t, r in pairs:
            flat, other = t[image].flatten(), r[image].flatten()
            total += 1 - float(flat @ other / (flat.norm() * other.norm()))
            level = torch.zeros(t.shape[2:], dtype=torch.float64)
            for y in range(level.shape[0]):
                for x in range(level.shape[1]):
                    a, b = t[image, :, y, x], r[image, :, y, x]
                    level[y, x] = 1 - a @ b / (a.norm() * b.norm())
            heat += nn.functional.interpolate(level[None, None], (32, 64), mode="bilinear", align_corners=True)[0, 0]
        losses.append(total)
        maps.append(heat)
    torch.testing.assert_close(model.losses(batch).detach().double(), torch.tensor(losses).double(), rtol=1e-5, atol=0)
    with torch.no_grad():
        assert float(model.training_step(batch, 0)) == pytest.approx(sum(losses) / 2, rel=1e-5)
        torch.testing.assert_close(model.anomaly_map(batch).double(), torch.stack(maps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SubspaceAD, {"variance": 1}, r"method\.variance=1: give a share above 0"),
        (SubspaceAD, {"folds": 1}, r"method\.folds=1: give 0"),
        (RAD, {"k": 1.5}, "method.k=1.5: give a whole number from 1"),
        (RAD, {"k": 0}, r"method\.k=0: give a whole number from 1"),
        (PaDiM, {"dim": 6}, r"method\.dim=6: the levels have 5 channels together"),
        (PaDiM, {"dim": 3, "regularisation": 0}, r"method\.regularisation=0: give a number above 0"),
    ],
)
def test_options_that_mean_nothing(method, options, message):
    with pytest.raises(UserError, match=message):
        fitted(method, CNN, make_images(CNN), **options)
