"""A run on images in any folders: trained, moved and evaluated, compared; and data.check=only, which trains nothing."""

import shutil

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.comparison.datasets import masks_of, root_of
from anomalib_lite.comparison.find_runs import read
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec


@pytest.fixture
def part(tmp_path):
    """A category in the MVTec layout, taken apart into two flat folders of pictures and one of masks."""
    folder = make_mvtec(tmp_path, "part", train=6, good=2, defects={"broken": 2})
    apart = tmp_path / "phone"
    for new, old in (("a", "train/good"), ("b", "test/good"), ("c", "test/broken"), ("m", "ground_truth/broken")):
        shutil.copytree(folder / old, apart / new)
    return folder, apart


def folders(apart):
    keys = {"normal": "a", "normal_test": "b", "abnormal": "c", "masks": "m"}
    return ["data=folder", *(f"data.{key}={apart / name}" for key, name in keys.items())]


def test_same_metrics_as_the_layout(part, tmp_path):
    folder, apart = part
    own = runs.result_of(*folders(apart), "data.category=part", "method=patchcore", run_dir=tmp_path / "own")
    layout = runs.result_of(*runs.folder_data(tmp_path, "part"), "method=patchcore", run_dir=tmp_path / "layout")
    assert own["metrics"] == layout["metrics"]
    assert own["dataset"] == "folder"
    assert own["categories"] == ["part"]
    [run] = read([tmp_path / "own"], [])[0]
    assert root_of(run) == apart
    assert set(masks_of(run, apart, "part")) == {"c/000.png", "c/001.png"}

    moved = tmp_path / "moved"
    shutil.move(apart, moved)
    runs.succeeded(runs.evaluate(f"run={tmp_path / 'own'}", f"output={tmp_path / 'again'}", *folders(moved)[1:]))
    [again] = read([tmp_path / "again"], [])[0]
    assert root_of(again) == moved
    assert set(masks_of(again, moved, "part")) == {"c/000.png", "c/001.png"}
    outcome = runs.evaluate(f"run={tmp_path / 'own'}", f"output={tmp_path / 'other'}", f"data.root={folder}")
    assert outcome.code == 0, outcome.err
    assert "another test set" in outcome.out


def test_check_only(part, tmp_path):
    _, apart = part
    outcome = runs.succeeded(runs.train(*folders(apart), "data.check=only", f"hydra.run.dir={tmp_path / 'run'}"))
    lines = outcome.out.splitlines()
    assert lines[0] == f"folder in {apart}"
    assert "phone: 6 training images, 4 test images" in lines
    assert "  test c: 2 images, 2 masks" in lines
    assert "  width x height, depth, format: 32x32 8-bit .png (10)" in lines
    assert "nothing was trained" in lines[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()
    with Image.open(tmp_path / "run" / "data.png") as picture:
        pixels = np.array(picture)
    first = np.array(Image.open(apart / "a" / "000.png").resize((160, 160), Image.Resampling.BICUBIC)).astype(float)
    assert np.corrcoef(pixels[4:164, 4:164].ravel(), first.ravel())[0, 1] > 0.8
    assert (pixels[332:492, 4:164] == (0, 220, 0)).all(-1).any()  # the outline of a defect
