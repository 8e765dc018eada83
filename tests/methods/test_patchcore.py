"""PatchCore: its coreset, its neighbours and its image score, each against a literal reading."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.transforms import Turn
from anomalib_lite.errors import UserError
from anomalib_lite.methods import screening
from anomalib_lite.methods.coreset import greedy_coreset, sparse_projection
from anomalib_lite.methods.nearest import Bank
from anomalib_lite.methods.patchcore import PatchCore
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import folder_data, result_of, train


def farthest_first(points: Tensor, count: int, first: int) -> Tensor:
    """The greedy rule as it is written down, in float64."""
    points, picks = points.double(), [first]
    nearest = (points - points[first]).square().sum(1)
    while len(picks) < count:
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(1))
    return torch.tensor(picks)


def clouds(kind: str, count: int) -> Tensor:
    """Points as features are: few directions, far from zero; in lumps; in many copies; hardly apart."""
    torch.manual_seed(0)
    points = torch.randn(count, 8) @ torch.randn(8, 24) + 0.1 * torch.randn(count, 24) + 5
    if kind == "lumps":
        points += 20 * torch.randn(10, 24)[torch.arange(count) % 10]
    if kind == "copies":
        points = points[torch.arange(count) % (count // 3)]
    if kind == "close":
        points = 100 + 1e-3 * points
    return points


@pytest.mark.parametrize("kind", ["directions", "lumps", "copies", "close"])
@pytest.mark.parametrize(("count", "share"), [(700, 0.5), (6000, 0.02), (5000, 0.1)])
def test_coreset_is_the_greedy_one(kind, count, share):
    points = clouds(kind, count)
    picks = int(count * share) if kind != "copies" else min(int(count * share), count // 3)
    assert torch.equal(greedy_coreset(points, picks, 3), farthest_first(points, picks, 3))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_coreset_of_few(count):
    points = clouds("directions", 7)
    assert torch.equal(greedy_coreset(points, count), farthest_first(points, count, 0))
    assert sorted(greedy_coreset(torch.zeros(7, 3), count).tolist())[:count] == sorted(
        farthest_first(torch.zeros(7, 3), count, 0).tolist()
    )


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("kind", ["directions", "lumps", "copies"])
def test_neighbours_are_the_nearest(kind, owned):
    """In several parts of the patches and of the bank, without the patches' own images."""
    rows, x, owners = clouds(kind, 5000), clouds("lumps", 600).view(2, 300, 24) + 0.01, torch.arange(5000) % 7
    distance, index = Bank(rows, owners).nearest(x, torch.tensor([3, 5]) if owned else None)
    for i, own in enumerate((3, 5)):
        every = torch.cdist(x[i].double(), rows.double())
        if owned:
            every[:, own::7] = torch.inf
        torch.testing.assert_close(distance[i].double(), every.min(1).values, rtol=1e-5, atol=0)
        if kind != "copies":
            assert torch.equal(index[i], every.argmin(1))


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["directions", "far", "copies", "equal", "isotropic"])
def test_screening_leaves_the_nearest(kind, bf16, owned, monkeypatch):
    """Bounds from few directions rule out rows; the nearest of all rows are found, against float64."""
    monkeypatch.setattr(screening, "has_bf16", lambda device: bf16)
    torch.manual_seed(0)
    points = 0.2 * torch.randn(5100, 96) + (100 if kind == "far" else 1)
    points += torch.randn(5100, 96) if kind == "isotropic" else torch.randn(5100, 8) @ torch.randn(8, 96)
    rows, x = points[:5000], points[5000:].view(2, 50, 96) + 0.01
    if kind == "copies":
        rows = torch.cat([rows[:2500]] * 2)
    if kind == "equal":
        rows = rows[:1].expand(5000, -1).contiguous()
    owners = torch.arange(5000) % 7
    bank = Bank(rows, owners)
    assert (bank.screen is None) == (kind == "isotropic" and not bf16)
    distance, index = bank.nearest(x, torch.tensor([3, 5]) if owned else None)
    for i, own in enumerate((3, 5)):
        every = torch.cdist(x[i].double(), rows.double())
        if owned:
            every[:, own::7] = torch.inf
        torch.testing.assert_close(distance[i].double(), every.min(1).values, rtol=1e-5, atol=0)
        if kind in ("directions", "isotropic"):
            assert torch.equal(index[i], every.argmin(1))


@pytest.mark.parametrize("bf16", [False, True])
def test_no_bound_is_too_small(bf16, monkeypatch):
    """x·y − ‖y‖²/2 in float64, with x and y less the mean of the rows. Rounding to bf16 keeps an order."""
    monkeypatch.setattr(screening, "has_bf16", lambda device: bf16)
    torch.manual_seed(0)
    points = torch.randn(2300, 8) @ torch.randn(8, 96) + 0.2 * torch.randn(2300, 96) + 5
    points[:1000] *= torch.rand(1000, 1)
    x, rows = points[::10], points  # a bound is tightest for a row that equals the patch
    screen = screening.Screen(rows)
    buffer = screen.buffer(len(x))
    screen.bound(x, buffer)
    x, rows = (each.double() - screen.mean.double() for each in (x, rows))
    exact = (x @ rows.T - rows.square().sum(1) / 2).to(buffer.dtype)
    bounds = buffer.movedim(1, 0).flatten(1)
    assert (bounds[:, : len(rows)] >= exact).all()
    assert (bounds[:, len(rows) :] == -torch.inf).all()
    assert (bounds[:, : len(rows)] - exact).float().mean() < 0.05 * exact.float().abs().mean()  # they are of use


def test_screening_takes_patches_that_are_not_finite():
    x = clouds("directions", 5000)
    bank = Bank(x, torch.zeros(5000))
    assert bank.screen is not None
    some = x[:3].clone()
    some[1, 4], some[2, 5] = torch.nan, torch.inf
    distance = bank.nearest(some[None])[0][0]
    assert distance[0] == 0
    assert not distance[1:].isfinite().any()


def test_the_only_image_is_not_left_out():
    bank = Bank(torch.randn(50, 8), torch.full((50,), 3))
    assert bank.nearest(bank.rows[None], torch.tensor([3]))[0].max() == 0


class Given(torch.nn.Module):
    """Stands for a backbone: its images are its features."""

    channels, reductions, frozen = (5,), (1,), True

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class Plain(Given):
    channels = (3,)


@pytest.mark.parametrize(("is_train_image", "rows"), [(False, 40), (True, 40), (True, 10)])
def test_image_score_is_equation_7(is_train_image, rows):
    """And a training image is scored without its own patches."""
    torch.manual_seed(0)
    backbone: Any = Given()
    model = PatchCore(neighbours=3, backbone=backbone, scoring={"image_score": "own"}, image_size=(4, 4))
    model.bank, model.owners = torch.randn(rows, 5), torch.arange(rows) % 9
    images = torch.randn(6, 5, 4, 4)
    batch = {"image": images, "path": ["?"] * 6, "index": torch.arange(6), "is_train_image": is_train_image}
    scores = model.score(batch)
    for i in range(6):
        patches = torch.nn.functional.avg_pool2d(images[i], 3, 1, 1).double().flatten(1).T
        bank = model.bank.double()
        every = torch.cdist(patches, bank)
        if is_train_image:
            every[:, i::9] = torch.inf
        test = int(every.min(1).values.argmax())
        star = int(every[test].argmin())
        apart = (bank - bank[star]).norm(dim=1)
        if is_train_image:
            apart[i::9] = torch.inf
        around = [n for n in apart.argsort()[:3] if apart[n] < torch.inf]
        top = math.exp(every[test, star])
        weight = 1 - top / sum(math.exp((patches[test] - bank[int(n)]).norm()) for n in around)
        assert float(scores["score"][i]) == pytest.approx(weight * float(every[test, star]), rel=1e-4)
        torch.testing.assert_close(scores["map"][i].double(), every.min(1).values.view(4, 4), rtol=1e-4, atol=1e-5)


def test_the_bank_holds_every_copy_and_an_image_is_scored_without_its_own(tmp_path):
    """With multiples of 90° the copies are known: NumPy turns the images."""
    make_mvtec(tmp_path, "bottle", train=2)
    turns: dict[str, Any] = {"augment": [Turn(step=90)], "copies": 4}
    data = AnomalyDataModule(read_folder, tmp_path, "bottle", image_size=32, normalize="none", **turns)
    data.setup()
    model: Any = PatchCore(coreset=1, backbone=Plain(), image_size=(32, 32))
    model.trainer = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(lightning_module=model))
    model.transfer_batch_to_device = lambda batch, device, index: batch
    model.on_fit_start()
    images = [np.asarray(Image.open(sample.path)) for sample in data.train_samples]
    bank = [np.rot90(image, copy + i).reshape(-1, 3) / 255 for copy in range(4) for i, image in enumerate(images)]
    means = torch.nn.functional.avg_pool2d  # of 3×3 patches
    expected = [means(torch.tensor(b.copy()).float().view(1, 32, 32, 3).movedim(-1, 1), 3, 1, 1) for b in bank]
    torch.testing.assert_close(model.bank, torch.cat([e[0].flatten(1).T for e in expected]))
    assert model.owners.tolist() == [i for _ in range(4) for i in range(2) for _ in range(32 * 32)]
    (batch,) = data.train_eval_dataloader()
    own = model.anomaly_map(batch)[0]
    others = model.anomaly_map(batch | {"is_train_image": True})[0]
    assert own.max() < 1e-3 < others.mean()


@pytest.mark.parametrize(("method", "preset", "copies"), [
    ("patchcore", "rotations_45", 8), ("norm_occ_closed_form", "rotations_45", 8), ("rad", "rotations_random", 31),
])  # fmt: skip
def test_rotations_of_few_shots(method, preset, copies, tmp_path):
    make_mvtec(tmp_path / "data", "bottle")
    few = [*folder_data(tmp_path / "data"), f"method={method}", "split=shots", "split.shots=2"]
    few.append("backbone.name=test_resnet.r160_in1k")
    result = result_of(*few, f"augment={preset}", run_dir=tmp_path / "turned")
    plain = result_of(*few, run_dir=tmp_path / "plain")
    assert result["metrics"] != plain["metrics"]
    assert result["data"] == plain["data"]
    if method == "patchcore":
        state = torch.load(tmp_path / "turned/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert len(state["bank"]) == int(0.1 * copies * 2 * 4 * 4)
        assert set(state["owners"].tolist()) == {0, 1}
    if method == "rad":
        state = torch.load(tmp_path / "turned/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert state["owners"].tolist() == [0, 1] * copies


def test_patches_are_drawn_from_every_category():
    backbone: Any = Given()
    model = PatchCore(max_patches=30, backbone=backbone)
    categories = ["b", "a", "b", "b", "a", "c"]
    torch.manual_seed(1)
    places = model.drawn(categories, 16)
    assert places is not None
    assert places.tolist() == sorted(set(places.tolist()))
    counts = [sum(categories[place // 16] == name for place in places.tolist()) for name in "abc"]
    assert counts == [30, 30, 16]
    torch.manual_seed(1)
    assert torch.equal(places, model.drawn(categories, 16))  # type: ignore[arg-type]
    assert not torch.equal(places, model.drawn(categories, 16))  # type: ignore[arg-type]
    assert PatchCore(backbone=backbone).drawn(categories, 16) is None


def test_the_drawn_patches_are_those_of_their_images(tmp_path):
    make_mvtec(tmp_path, "bottle", train=5)
    data = AnomalyDataModule(read_folder, tmp_path, "bottle", image_size=32, normalize="none", eval_batch_size=2)
    data.setup()
    found = {}
    for most in (None, 100):
        model: Any = PatchCore(coreset=1, max_patches=most, backbone=Plain(), image_size=(32, 32))
        model.trainer = SimpleNamespace(datamodule=data)
        model.transfer_batch_to_device = lambda batch, device, index: batch
        torch.manual_seed(0)
        model.on_fit_start()
        found[most] = model.bank, model.owners
    (every, owners), (some, of_some) = found.values()
    assert len(some) == 100
    at = (some[:, None] == every).all(2).int().argmax(1)
    assert torch.equal(every[at], some)
    assert torch.equal(owners[at], of_some)
    assert len(of_some.unique()) == 5


def test_a_sparse_projection_keeps_distances_on_average():
    torch.manual_seed(0)
    points = torch.randn(40, 400)
    projected = sparse_projection(points, 2000)
    ratio = torch.pdist(projected) / torch.pdist(points)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.1
    unit = sparse_projection(torch.eye(400), 100)
    assert (unit != 0).float().mean() == pytest.approx(1 / 20, rel=0.1)
    assert unit.unique().tolist() == pytest.approx([-math.sqrt(0.2), 0, math.sqrt(0.2)])


def test_the_coreset_of_drawn_and_projected_patches(tmp_path):
    make_mvtec(tmp_path / "data", "bottle")
    options = ("method=patchcore", "backbone=resnet18", "method.max_patches=60", "method.project=8")
    result_of(*folder_data(tmp_path / "data"), *options, run_dir=tmp_path / "run")
    bank = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]["bank"]
    assert bank.shape == (6, 384)  # of 60 patches a tenth; layers 2 and 3 have 128 and 256 channels


@pytest.mark.parametrize(("option", "value"), [("coreset", 0), ("coreset", 1.5), ("neighbours", 0), ("max_patches", 0)])
def test_values_that_mean_nothing(option, value):
    backbone: Any = Plain()
    with pytest.raises(UserError, match=f"^method.{option}={value}: give a "):
        PatchCore(**{option: value}, backbone=backbone)


def test_no_score_of_its_own(tmp_path):
    make_mvtec(tmp_path)
    outcome = train(
        "method=norm_occ", "scoring.image_score=own", *folder_data(tmp_path), f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert outcome.code == 2
    assert outcome.err == "error: scoring.image_score=own: NormOCC has no image score of its own; give max\n"
