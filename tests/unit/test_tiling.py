"""Large images in tiles: the grid, the blended maps, what training sees, and whole programs."""

import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomalib_lite.compare import main as compare
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.dataset import Batch
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.tiling import Tiling
from anomalib_lite.data.transforms import Turn
from anomalib_lite.errors import UserError
from anomalib_lite.methods.tiles import tiled, tiled_map, tiles_of
from anomalib_lite.runs.load import load_run
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec, save_image
from tests.helpers.interrupt import interrupted_after
from tests.helpers.ranks import on_ranks

ALIKE = ("recontrast", "inp_former", "subspace_ad", "norm_occ_closed_form")  # as rd4ad, dinomaly, padim and norm_occ
ELSEWHERE = ("patchcore", "uniad", "ltad")  # the tests of whole programs below name them
OTHERS = sorted({path.stem for path in (runs.ROOT / "conf" / "method").glob("*.yaml")} - {*ALIKE, *ELSEWHERE})
TILES = "data.tiling={size: 32, overlap: 8}"  # 72 pixels are three tiles, the last one shifted


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=4, good=2, defects={"broken": 2}, size=72)
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Images of 40 pixels, which are four tiles."""
    root = tmp_path_factory.mktemp("small")
    make_mvtec(root, "bottle", train=4, good=2, defects={"broken": 2}, size=40)
    return root


# --- the grid ---


@pytest.mark.parametrize("size", [(32, 32), (33, 40), (71, 95), (32, 200), (64, 56)])
@pytest.mark.parametrize("overlap", [0, 1, 8, 31])
def test_tiles_cover_every_pixel(size, overlap):
    tiling = Tiling(32, overlap)
    covered, places = np.zeros(size, int), tiling.places(*size)
    for top, left in places:
        assert 0 <= top <= size[0] - 32
        assert 0 <= left <= size[1] - 32
        covered[top : top + 32, left : left + 32] += 1
    assert covered.min() == 1
    assert len(set(places)) == len(places)
    for starts, length in zip(tiling.axes(*size), size, strict=True):
        steps = np.diff(starts)
        assert (steps[:-1] == 32 - overlap).all()  # all but the last one, which is shifted
        assert (steps <= 32 - overlap).all()
        assert len(starts) == 1 + np.ceil((length - 32) / (32 - overlap))


def test_images_below_the_size_of_a_tile():
    message = "^data.tiling.image_size: 80×48 pixels are smaller than a tile of 64×64"
    with pytest.raises(UserError, match=message):
        Tiling(size=64, image_size=[80, 48])


# --- blending ---


def batch_of(count: int, height: int, width: int, **more: Any) -> Batch:
    torch.manual_seed(0)
    return Batch(
        image=torch.randn(count, 3, height, width),
        mask=torch.rand(count, height, width) > 0.5,
        index=torch.arange(10, 10 + count),
        path=[str(i) for i in range(count)],
        is_train_image=True,
        **more,
    )


def test_tiles_are_parts_of_their_images():
    batch, tiling = batch_of(2, 50, 40), Tiling([32, 24], 8, batch=4)
    assert [len(tiles["image"]) for tiles, _ in tiles_of(batch, tiling)] == [4, 4]
    found = [
        (tiles["index"][n].item(), tiles["path"][n], y, x, tiles["image"][n], tiles["mask"][n])
        for tiles, places in tiles_of(batch, tiling)
        for n, (_, y, x) in enumerate(places)
        if tiles["is_train_image"] is True
    ]
    expected = list(product((0, 1), (0, 18), (0, 16)))
    assert [(index - 10, int(path), y, x) for index, path, y, x, *_ in found] == [(i, i, y, x) for i, y, x in expected]
    for index, _, y, x, image, mask in found:
        assert torch.equal(image, batch["image"][index - 10, :, y : y + 32, x : x + 24])
        assert torch.equal(mask, batch["mask"][index - 10, y : y + 32, x : x + 24])


def test_blended_by_the_formula():
    """Against a loop over pixels in float64; the tiles' maps are unrelated, and a quarter of the tile's size."""
    batch, tiling = batch_of(2, 41, 30), Tiling([16, 12], 5, batch=3)
    maps = torch.rand(2 * len(tiling.places(41, 30)), 4, 3)
    given = iter(maps.split(3))
    blended = tiled_map(lambda tiles: next(given), batch, tiling)
    assert isinstance(blended, torch.Tensor)
    large = torch.nn.functional.interpolate(maps[:, None], (16, 12), mode="bilinear")[:, 0].double().numpy()
    expected, weights = np.zeros((2, 41, 30)), np.zeros((2, 41, 30))
    for number, (image, (top, left)) in enumerate(product((0, 1), tiling.places(41, 30))):
        for i, j in product(range(16), range(12)):
            weight = min(i + 1, 16 - i) * min(j + 1, 12 - j)
            expected[image, top + i, left + j] += weight * large[number, i, j]
            weights[image, top + i, left + j] += weight
    assert blended.numpy() == pytest.approx(expected / weights, rel=1e-6)


def test_constants_stay_and_a_single_tile_is_not_changed():
    for overlap in (0, 7, 15):
        batch = batch_of(1, 37, 53)
        whole = tiled(
            lambda tiles: {"x": torch.full((len(tiles["image"]), 2, 4, 4), 3.7)}, batch, Tiling(16, overlap, batch=5)
        )
        assert whole["x"].shape == (1, 2, 37, 53)
        assert whole["x"].numpy() == pytest.approx(3.7, rel=1e-6)
    batch = batch_of(3, 32, 24)
    raw = batch["image"].square().sum(1)
    whole = tiled(
        lambda tiles: {"x": tiles["image"].square().sum(1, keepdim=True)}, batch, Tiling([32, 24], 8, batch=2)
    )
    assert torch.equal(whole["x"][:, 0], raw)


def test_own_image_scores_are_the_largest_of_the_tiles():
    batch, tiling = batch_of(2, 50, 40), Tiling(32, 8, batch=3)
    result = tiled_map(lambda tiles: (tiles["image"][:, 0], tiles["image"].amax((1, 2, 3))), batch, tiling)
    assert torch.equal(result[1], batch["image"].amax((1, 2, 3)))


# --- training ---


def module(root: Path, **options: Any) -> AnomalyDataModule:
    given: dict[str, Any] = {"normalize": "none", "batch_size": 2, "eval_batch_size": 4} | options
    data = AnomalyDataModule(read_folder, root, "bottle", **given)
    data.setup()
    return data


def cut_by_hand(data: AnomalyDataModule, index: int) -> set[bytes]:
    """All tiles of a training image, from its pixels."""
    image = data.eval_pipeline.load(data.train_samples[index].path)
    tiles = [image[y : y + 32, x : x + 32] for y, x in product((0, 24, 40), repeat=2)]
    return {np.ascontiguousarray(tile).tobytes() for tile in tiles}


def pixels(image: torch.Tensor) -> bytes:
    return (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_closed_forms_see_every_tile_once(root, workers):
    data = module(root, tiling={"size": 32, "overlap": 8}, workers=workers, augment=[Turn(angles=[10, 350])], copies=2)
    seen: dict[int, list[bytes]] = {}
    for batch in data.fit_dataloader():
        assert len(batch["image"]) <= 4
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            seen.setdefault(index, []).append(pixels(image))
    assert [len(set(seen[i])) for i in range(4)] == [18] * 4  # the second copy of each tile is turned
    for index, tiles in seen.items():
        assert set(tiles[:9]) == cut_by_hand(data, index)


def test_epochs_of_training_visit_all_tiles(root):
    data = module(root, tiling={"size": 32, "overlap": 8})
    assert data.batches_per_epoch == 2
    loader, seen = data.train_dataloader(), dict[int, list[bytes]]()
    for _ in range(9):
        for batch in loader:
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                seen.setdefault(index, []).append(pixels(image))
    for index, tiles in seen.items():
        assert len(tiles) == 9
        assert set(tiles) == cut_by_hand(data, index)


def test_images_of_different_sizes(tmp_path):
    """No tile counts twice where an image has fewer; at a working size all have the same number."""
    folder = make_mvtec(tmp_path, train=3, size=72)
    save_image(folder / "train" / "good" / "001.png", size=40)
    data = module(tmp_path, tiling={"size": 32, "overlap": 8})
    assert data.test_size == data.map_size == "original"
    indices = [i for batch in data.fit_dataloader() for i in batch["index"].tolist()]
    assert [indices.count(i) for i in range(3)] == [9, 4, 9]
    assert data.notes[-1].startswith("data.tiling: images are cut into 4 to 9 tiles of 32×32, which")
    data = module(tmp_path, tiling={"size": 32, "overlap": 8, "image_size": [56, 32]})
    assert [len(batch["image"]) for batch in data.fit_dataloader()] == [4, 2]
    assert {tuple(batch["image"].shape) for batch in data.test_dataloader()} == {(1, 3, 56, 32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treatment": "texture"}, r"data.tiling: goes without data.treatment=texture; give data.treatment=object"),
        ({"transform": []}, r"data.tiling: goes without data.transform; give data.tiling.image_size and data.augment"),
        ({"tiling": {"size": 80}}, r"/.*/train/good/000.png: 72×72 pixels are smaller than a tile of 80×80 .*"),
        ({"copies": 2}, "data.copies=2: all copies are equal; .*"),
    ],
)
def test_bad_input(root, options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        module(root, **({"tiling": {"size": 32, "overlap": 8}} | options))


# --- programs ---


scores_of = partial(runs.scores_of, below="test/")


@pytest.mark.parametrize("method", ["patchcore", "uniad"])
def test_trained_evaluated_predicted(method, small, tmp_path):
    run = tmp_path / "run"
    more = ["data.val_fraction=0.5", "method.coreset=1"] if method == "patchcore" else ["trainer.max_epochs=4"]
    command = [*runs.method(method), *runs.folder_data(small), TILES, *more]
    result = runs.result_of(*command, run_dir=run)
    assert result["protocol"]["data"]["tiling"] == {"size": [32, 32], "overlap": 8}
    assert result["protocol"]["data"]["map_size"] == "original"
    assert not result["cache"]["used"]
    assert sum("data.tiling: images are cut into 4 tiles of 32×32" in note for note in result["notes"]) == 1
    assert any("4 epochs saw all tiles" in note for note in result["notes"]) == (method == "uniad")
    assert all(value is not None for key, value in result["metrics"].items() if key != "aupimo")  # too few pixels
    if method == "patchcore":  # the bank holds all patches: with its own tiles a training image would have the score 0
        with np.load(run / "maps.npz") as file:
            assert file["normal/scores"].min() > 0.1 * max(scores_of(run).values())
    else:
        with interrupted_after(3):
            runs.train(
                *command, "trainer.checkpoint_minutes=0", "trainer.log_every=1", f"hydra.run.dir={tmp_path / 'b'}"
            )
        runs.result_of(*command, "trainer.checkpoint_minutes=0", "resume=true", run_dir=tmp_path / "b")
        assert scores_of(tmp_path / "b") == scores_of(run)
        outcome = runs.train("resume=true", "data.tiling={size: 24}", f"hydra.run.dir={run}", small=False)
        assert re.match(r"error: data.tiling.\w+=", outcome.err)

    outcome = runs.evaluate(
        f"run={run}", f"output={tmp_path / 'again'}", "data.eval_batch_size=5", "scoring.map_size=36"
    )
    assert (outcome.code, outcome.err) == (0, "")
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["protocol"]["data"]["map_size"] == [36, 36]
    outcome = runs.evaluate(f"run={run}", f"output={tmp_path / 'same'}")
    assert scores_of(tmp_path / "same") == scores_of(run)

    save_image(tmp_path / "photos" / "small.png", size=20)
    photos = [small / "bottle" / "test", tmp_path / "photos"]
    outcome = runs.predict(
        f"run={run}", f"input=[{photos[0]},{photos[1]}]", f"output={tmp_path / 'out'}", "batch_size=4"
    )
    assert outcome.code == 1
    assert re.search(r"left out: /.*/small.png: 20×20 pixels are smaller than a tile of 32×32", outcome.err)
    assert scores_of(tmp_path / "out") == pytest.approx(scores_of(run), rel=1e-5)
    loaded = load_run(run)
    images = [loaded._pipeline.load(photos[0] / name) for name in scores_of(run)]
    scores, maps = loaded.predict(images)
    assert scores.tolist() == pytest.approx(list(scores_of(run).values()), rel=1e-5)
    assert maps[0].shape == (40, 40)
    with pytest.raises(UserError, match=r"^images\[0\]: 40×31 pixels are smaller than a tile"):
        loaded.predict([images[0][:, :31]])


def test_a_tile_as_large_as_the_image_changes_nothing(small, tmp_path):
    """To the last bit, where every network sees the same batches; but such runs do not share a table."""
    common = [*runs.folder_data(small), "data.image_size=40", "data.eval_batch_size=1", "cache.enabled=false"]
    common += ["hardware.feature_memory_gb=0"]
    for name, more in (
        ("patchcore", []),
        ("ssae", ["data.treatment=object", "trainer.max_epochs=1"]),
    ):
        options = [*runs.method(name), *common, *more]
        runs.result_of(*options, run_dir=tmp_path / f"{name}_plain")
        runs.result_of(*options, "data.tiling={size: 40}", run_dir=tmp_path / f"{name}_tiled")
        assert scores_of(tmp_path / f"{name}_tiled") == scores_of(tmp_path / f"{name}_plain"), name
    outcome = runs.run(compare, tmp_path, "--csv", tmp_path / "runs.csv")
    assert outcome.code == 0
    assert len(re.findall(r"table \d+: .*: image AUROC", outcome.out)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rel"), [("norm_occ", 1e-4), ("ssae", 1e-2)])
def test_two_ranks_are_one_device(method, rel, root, tmp_path):
    """Training shares the tiles of a batch, and the test whole images. Batch norm (ssae) is synchronised."""
    options = [*runs.defaults(), *runs.folder_data(root), TILES, *runs.method(method), "trainer.max_epochs=3"]
    options += ["hardware=ddp", "hardware.accelerator=cpu", "hardware.precision=32"]
    for ranks in (1, 2):
        on_ranks("train", [*options, f"hardware.devices={ranks}", f"hydra.run.dir={tmp_path / str(ranks)}"], ranks)
    one, two = (scores_of(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=rel)


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods(method, small, tmp_path):
    """Two steps, held-out images and their loss, figures; predictions are what was evaluated."""
    run, needs = tmp_path / "run", runs.method(method)
    budget = ["trainer.max_epochs=null", "trainer.max_steps=2", "data.val_fraction=0.5", "data.batch_size=2"]
    result = runs.result_of(*needs, *runs.folder_data(small), TILES, *budget, "scoring.image_smooth=2", run_dir=run)
    assert not [note for note in result["notes"] if "left out" in note]
    assert any("compares equal positions" in note for note in result["notes"]) == (method in ("padim", "rad", "ssae"))
    outcome = runs.predict(f"run={run}", f"input={small / 'bottle' / 'test'}", f"output={tmp_path / 'out'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert scores_of(tmp_path / "out") == pytest.approx(scores_of(run), rel=1e-4)


@pytest.mark.parametrize("method", ["patchcore", "ltad"])
def test_one_model_of_two_categories(method, tmp_path):
    """Of images of different sizes; each category has its thresholds."""
    make_mvtec(tmp_path, "bottle", train=3, good=1, defects={"broken": 1}, size=72)
    make_mvtec(tmp_path, "tile", train=3, good=1, defects={"crack": 1}, size=40)
    run, both = tmp_path / "run", runs.folder_data(tmp_path, "[bottle,tile]")
    result = runs.result_of(*runs.method(method), *both, TILES, "data.balanced=true", run_dir=run)
    assert result["setting"] == "unified"
    assert {name: found["images"] for name, found in result["thresholds"]["per_category"].items()} == {
        "bottle": 3, "tile": 3,
    }  # fmt: skip
    for category in ("bottle", "tile"):
        out, photos = tmp_path / f"out_{category}", tmp_path / category / "test"
        outcome = runs.predict(f"run={run}", f"input={photos}", f"output={out}", f"category={category}")
        assert (outcome.code, outcome.err) == (0, "")
        evaluated = {path for path in runs.scores_of(run) if path.startswith(f"{category}/")}
        scores = {path.rpartition("test/")[2]: runs.scores_of(run)[path] for path in evaluated}
        assert scores_of(out) == pytest.approx(scores, rel=1e-4)


def test_the_grid_is_shown(root, tmp_path):
    outcome = runs.train(*runs.folder_data(root), TILES, "data.check=only", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 0
    assert "tiles of 32x32 in an image of 72x72: 9, in 3 rows and 3 columns that overlap by 8 or more" in outcome.out
