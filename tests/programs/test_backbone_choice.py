"""Runs with a backbone from a folder, with its own mean and standard deviation, and with transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from anomalib_lite.data.samples import load_rgb
from anomalib_lite.runs.artifacts import read_scores
from anomalib_lite.runs.load import load_run
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import (
    assert_refused,
    evaluate,
    folder_data,
    method,
    result_of,
    scores_of,
    succeeded,
    train,
)
from tests.programs.test_bad_input import assert_one_line

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, train=4, good=2, defects={"broken": 2})
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder as timm writes it for the hub: random weights of a resnet18, and its mean and standard deviation."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet18"), folder, safe_serialization=True)
    about = json.loads((folder / "config.json").read_text())
    about["pretrained_cfg"] |= {"mean": MEAN, "std": STD}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_a_folder_and_its_normalisation(root, model, tmp_path, monkeypatch):
    """The backbone's numbers are in the protocol, and a loaded run prepares images with them, from any folder. The
    model's folder may be moved.
    """
    monkeypatch.chdir(model.parent)
    source = (f"backbone.name=local-dir:{model.name}", "backbone.weights=auto", *folder_data(root))
    plain = result_of(*source, run_dir=tmp_path / "plain")
    own = result_of(*source, "data.normalize=backbone", run_dir=tmp_path / "own")
    assert "normalize" not in plain["protocol"]["data"]
    assert any("fewer than 50" in note and note.endswith("bottle (4)") for note in plain["notes"])
    assert own["protocol"]["data"] == plain["protocol"]["data"] | {"normalize": {"mean": MEAN, "std": STD}}
    monkeypatch.chdir(tmp_path)
    stored = read_scores(tmp_path / "own")["bottle"]
    images = [load_rgb(root / path) for path in stored.paths]
    found, _ = load_run(tmp_path / "own").predict(images)
    np.testing.assert_allclose(found, stored.scores, rtol=1e-4)

    again = (f"run={tmp_path / 'own'}", f"output={tmp_path / 'again'}")
    model.rename(tmp_path / "moved")
    assert_refused(evaluate(*again, f"backbone.name={tmp_path / 'moved'}"), "moved: .*another kind of value")
    succeeded(evaluate(*again, "backbone.name=local-dir:moved"))
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "own")


def test_imagenets_own_numbers_share_a_table_with_the_default(root, tmp_path):
    result = result_of(*folder_data(root), "backbone=resnet18", "data.normalize=backbone", run_dir=tmp_path / "run")
    assert "normalize" not in result["protocol"]["data"]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["method=ssae", "backbone=none", "data.normalize=backbone"], "data.normalize=backbone: there is no backbone"),
        (["backbone.name=vit_tiny_patch16_224", "backbone.layers=[1]", "data.image_size=40"],
         r"data.image_size=40: .*give 32 or 48"),
        (["backbone.name=vit_tiny_patch16_224", "backbone.layers=[1,2,3]", *method("recontrast")[:1]],
         r"backbone.layers=\[1, 2, 3\]: give three levels, each half"),
    ],
)  # fmt: skip
def test_mistakes(root, tmp_path, options, pattern):
    assert_one_line(train(*folder_data(root), *options, f"hydra.run.dir={tmp_path / 'run'}"), pattern)


@pytest.mark.parametrize(
    ("kind", "name"), [("patchcore", "swin_tiny_patch4_window7_224"), ("norm_occ", "vit_tiny_patch16_224")]
)
def test_transformers_off_their_own_size(root, tmp_path, kind, name):
    source = [f"backbone.name={name}", "backbone.layers=[0,1]", "data.image_size=64", "data.eval_batch_size=2"]
    result = result_of(*method(kind), *source, *folder_data(root), run_dir=tmp_path / "run")
    assert all(value is not None for key, value in result["metrics"].items() if key != "aupimo")  # it needs more pixels
