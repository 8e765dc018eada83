"""Deep images through the programs: what a run knows of its training images is used wherever it is used again."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_lite.compare import main as compare
from anomalib_lite.runs.load import load_run
from tests.helpers import run_programs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import evaluate, folder_data, predict, result_of, run

scores_of = partial(run_programs.scores_of, below="test/")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """8-bit gray pictures."""
    root = tmp_path_factory.mktemp("plain")
    make_mvtec(root)
    for path in root.rglob("*.png"):
        cv2.imwrite(str(path), np.asarray(Image.open(path).convert("L")))
    return root


@pytest.fixture(scope="module")
def deep(plain, tmp_path_factory) -> Path:
    """The same pictures with 12 bits in 16-bit files; masks stay."""
    root = shutil.copytree(plain, tmp_path_factory.mktemp("deep") / "data")
    for path in root.rglob("*/[0-9][0-9][0-9].png"):
        values = np.asarray(Image.open(path).convert("L"))
        cv2.imwrite(str(path), np.rint(values * (4095 / 255)).astype(np.uint16))
    return root


@pytest.fixture(scope="module")
def trained(deep, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    result_of(*folder_data(deep), run_dir=run)
    return run


def test_the_runs_range_of_values(plain, deep, trained, tmp_path):
    """12 bits give the numbers of the pictures in 8 bits, up to rounding. One dark image is not stretched."""
    result = json.loads((trained / "result.json").read_text())
    assert result["data"]["value_range"] == [0, 4095]
    assert "value_range" not in result["protocol"]["data"]  # found: runs of one data set share a table
    assert any(note.startswith("data.value_range=[0,4095] assumed: the pixels of the 6") for note in result["notes"])
    same = result_of(*folder_data(plain), run_dir=tmp_path / "plain")
    assert "value_range" not in same["data"]
    assert scores_of(trained) == pytest.approx(scores_of(tmp_path / "plain"), rel=0.03)

    outcome = evaluate(f"run={trained}", f"output={tmp_path / 'again'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert scores_of(tmp_path / "again") == pytest.approx(scores_of(trained), rel=1e-6)
    outcome = predict(f"run={trained}", f"input={deep / 'bottle' / 'test'}", f"output={tmp_path / 'out'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "note" not in outcome.out
    assert scores_of(tmp_path / "out") == pytest.approx(scores_of(trained), rel=1e-6)

    values = np.asarray(Image.open(deep / "bottle/test/good/000.png"))
    loaded, dark = load_run(trained), np.rint(values * (255 / 4095) / 8).astype(np.uint8)
    (score, darker, wanted), _ = loaded.predict([values, values // 8, np.repeat(dark[..., None], 3, -1)])
    assert score == pytest.approx(scores_of(trained)["good/000.png"], rel=1e-5)
    assert darker == pytest.approx(wanted, rel=0.03)


def test_images_of_another_depth(plain, deep, trained, tmp_path):
    """They are scored, and a note says that they are of another kind; both ways round."""
    source = plain / "bottle" / "test" / "good"
    outcome = predict(f"run={trained}", f"input={source}", f"output={tmp_path / 'out'}")
    assert outcome.code == 0
    assert f"note: 3 images are of another kind than the training images (first: {source}/000.png)" in outcome.out
    assert "8 bits per channel, the training images' integers of more than 8 bits" in outcome.out
    own = scores_of(trained)
    wanted = {f"good/{name}": score for name, score in scores_of(tmp_path / "out").items()}
    assert wanted == pytest.approx({key: own[key] for key in own if key.startswith("good")}, rel=0.03)


def test_images_outside_the_range(deep, trained, tmp_path):
    """16-bit images for a run of 12 bits, and the other way round: noted, in predict and for another test set."""
    bright = tmp_path / "bright"
    shutil.copytree(deep, bright)
    for path in bright.rglob("*/[0-9][0-9][0-9].png"):
        cv2.imwrite(str(path), np.asarray(Image.open(path)).astype(np.uint16) * 16)
    outcome = predict(f"run={trained}", f"input={bright / 'bottle/test/good'}", f"output={tmp_path / 'out'}")
    assert "note: 3 of 3 images looked at do not fit data.value_range=[0,4095]" in outcome.out
    outcome = evaluate(f"run={trained}", f"output={tmp_path / 'other'}", f"data.root={bright}")
    assert "do not fit data.value_range=[0,4095]" in outcome.out
    result = result_of(*folder_data(bright), run_dir=tmp_path / "run")
    assert not any("do not fit" in note for note in result["notes"])
    outcome = predict(f"run={tmp_path / 'run'}", f"input={deep / 'bottle/test/good'}", f"output={tmp_path / 'out2'}")
    assert "note: 3 of 3 images looked at do not fit data.value_range=[0,65535]" in outcome.out


def test_a_given_range(deep, tmp_path):
    """Half the range is twice as bright: by the formula on the pixels that a method sees."""
    result = result_of(*folder_data(deep), "data.value_range=[0,2047]", run_dir=tmp_path)
    assert result["protocol"]["data"]["value_range"] == [0, 2047]
    values = np.asarray(Image.open(deep / "bottle/test/good/000.png"))
    bright = np.clip(np.rint(values * (255 / 2047)), 0, 255).astype(np.uint8)
    scores, _ = load_run(tmp_path).predict([np.repeat(bright[..., None], 3, -1)])
    assert scores[0] == pytest.approx(scores_of(tmp_path)["good/000.png"], rel=1e-5)


def latin(folder: Path, old: str, new: bytes) -> None:
    (folder / old).rename(os.fsdecode(bytes(folder) + b"/" + new))


def test_names_that_are_not_utf8(plain, tmp_path):
    """Files, folders of defects and categories: scored alike, and readable in every table."""
    root = shutil.copytree(plain, tmp_path / os.fsdecode(b"d\xe4ta"))
    latin(root / "bottle", "test/good/000.png", b"test/good/b\xe4r.png")
    latin(root / "bottle", "test/broken", b"test/br\xfcche")
    latin(root / "bottle", "ground_truth/broken", b"ground_truth/br\xfcche")
    latin(root, "bottle", b"fl\xe4sche")
    original = result_of(*folder_data(plain), run_dir=tmp_path / "original")
    more = ["data=folder", f"data.root={root}"]
    result = result_of(*more, run_dir=tmp_path / "run")
    assert result["categories"] == [r"fl\xe4sche"]
    assert result["metrics"] == original["metrics"]
    assert r"br\xfcche" in result["per_defect"][r"fl\xe4sche"]
    scores = scores_of(tmp_path / "run")
    assert scores[r"good/b\xe4r.png"] == scores_of(tmp_path / "original")["good/000.png"]
    assert r"br\xfcche/000.png" in scores
    result_of(*more, "cache.enabled=false", "data.val_fraction=0.4", run_dir=tmp_path / "more")

    outcome = predict(f"run={tmp_path / 'run'}", f"input={root}", f"output={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("Traceback")) == (0, 0)
    assert r"fl\xe4sche/test/good/b\xe4r.png" in (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")
    outcome = run(compare, tmp_path / "run", "--html", tmp_path / "page.html", "--csv", tmp_path / "runs.csv")
    assert (outcome.code, outcome.err) == (0, "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"b\xe4r.png" in page
    assert page.count("data:image/jpeg") == 6  # thumbnails: the file of each name was found


def test_exif_orientation(tmp_path):
    """The same pictures upright, and stored turned with a tag: equal results, and equal overlays in predict."""
    upright, turned = tmp_path / "upright", tmp_path / "turned"
    make_mvtec(upright)
    shutil.copytree(upright, turned)
    exif = Image.Exif()
    exif[0x0112] = 8
    for path in turned.rglob("*/[0-9][0-9][0-9].png"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_270).save(path, exif=exif)
    first = result_of(*folder_data(upright), run_dir=tmp_path / "first")
    again = result_of(*folder_data(turned), run_dir=tmp_path / "again")
    assert again["metrics"] == first["metrics"]
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "first")
    assert any("12 images are turned upright, as their EXIF tag says" in note for note in again["notes"])
    figure = "figures/bottle.png"
    assert (tmp_path / "again" / figure).read_bytes() == (tmp_path / "first" / figure).read_bytes()
    for root in (upright, turned):
        outcome = predict(f"run={tmp_path / 'first'}", f"input={root / 'bottle/test'}", f"output={root}_out")
        assert (outcome.code, outcome.err) == (0, "")
    for kind in ("overlays", "heatmaps"):
        files = [
            (root.with_name(f"{root.name}_out") / kind / "good/000.png.png").read_bytes() for root in (upright, turned)
        ]
        assert files[0] == files[1]


def test_empty_masks_are_masks(tmp_path):
    folder = make_mvtec(tmp_path / "data", defects={"broken": 2})
    for mask in (folder / "ground_truth" / "broken").iterdir():
        Image.new("L", (32, 32)).save(mask)
    notes = result_of(*folder_data(tmp_path / "data"), run_dir=tmp_path / "run")["notes"]
    (note,) = [note for note in notes if "can't be computed" in note]
    assert "pixel_auroc" in note
    assert note.endswith("can't be computed: the ground truth masks have no pixel with a defect")
