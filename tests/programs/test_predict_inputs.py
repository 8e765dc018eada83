"""What predict's input= may name, and what it leaves out: nothing in silence, and the exit code says so."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.image_trees import make_mvtec, save_image
from tests.helpers.run_programs import assert_refused, folder_data, predict, result_of, scores_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """a/1.png a/2.jpg a/notes.txt a/deep/1.png b/1.png c, d.png and [e].png; every picture differs."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("a/1.png", "a/2.jpg", "a/deep/1.png", "b/1.png", "c, d.png", "[e].png")):
        save_image(folder / name, seed=i)
    (folder / "a" / "notes.txt").write_text("text")
    return folder


INPUTS = {
    "{p}/a": ["1.png", "2.jpg", "deep/1.png"],
    "[{p}/a,{p}/b]": ["a/1.png", "a/2.jpg", "a/deep/1.png", "b/1.png"],
    "[{p}/b, {p}/a/1.png]": ["a/1.png", "b/1.png"],
    "[{p}/a/1.png,{p}/a]": ["1.png", "2.jpg", "deep/1.png"],
    "{p}/a/*.png": ["1.png"],
    "{p}/*/1.*": ["a/1.png", "b/1.png"],
    "{p}/**/1.png": ["a/1.png", "a/deep/1.png", "b/1.png"],
    "{p}/a/*": ["1.png", "2.jpg", "deep/1.png"],
    '["{p}/c, d.png",{p}/b]': ["b/1.png", "c, d.png"],
    "{p}/[e].png": ["[e].png"],
    "{p}/a/../b": ["1.png"],
    "[{p}/a/../b,{p}/a/deep]": ["a/deep/1.png", "b/1.png"],
}


@pytest.mark.parametrize("text", INPUTS)
def test_inputs(text, trained, photos, tmp_path):
    """Names are below the folder that all inputs share; the same name twice stays two rows with their own scores."""
    outcome = predict(f"run={trained}", f"input={text.format(p=photos)}", f"output={tmp_path / 'out'}")
    assert (outcome.code, outcome.err) == (0, "")
    scores = scores_of(tmp_path / "out")
    assert sorted(scores) == INPUTS[text]
    assert len(set(scores.values())) == len(scores)
    overlays = tmp_path / "out" / "overlays"
    assert sorted(f"{path.relative_to(overlays)}" for path in overlays.rglob("*.png")) == [
        f"{n}.png" for n in INPUTS[text]
    ]
    assert ("1 files are no images (first: " in outcome.out) == (INPUTS[text][1:2] == ["2.jpg"] or "a,{p}" in text)


def test_inputs_that_are_none(trained, photos, tmp_path):
    run, out = f"run={trained}", f"output={tmp_path / 'out'}"
    for given, message in (
        (f"[{photos}/a,{photos}/z]", f"input={photos}/z: no such file or folder"),
        (f"{photos}/*.gif", f"input={photos}/*.gif: no such file or folder"),
        ("[]", "input=[]: give paths, as in input=[first,second]"),
        ("[a,,b]", "input=[a,,b]: give paths"),
        (f"{photos}/a/*.txt", f"input={photos}/a/*.txt: holds no image ("),
        (f"[{photos}/b,{tmp_path}]", "choose a folder outside"),
    ):
        assert_refused(predict(run, f"input={given}", out), re.escape(message))
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_named(trained, photos, tmp_path):
    """Linked folders and more formats are scored; dead links, other formats, later pages are named; exit code 1."""
    source = tmp_path / "in"
    save_image(source / "a.png")
    for name in ("b.gif", "c.jfif", "d.ppm"):
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(source / name, "JPEG" if "jfif" in name else None)
    (source / "day1").symlink_to(photos / "a")
    (source / "day1 again").symlink_to(photos / "a")
    (source / "loop").symlink_to(source)
    (source / "gone.png").symlink_to("/not/mounted/d.png")
    (source / "phone.HEIC").write_bytes(b"x")
    pages = [Image.new("L", (32, 32), value) for value in (1, 2, 3)]
    pages[0].save(source / "stack.tif", save_all=True, append_images=pages[1:])
    outcome = predict(f"run={trained}", f"input={source}", f"output={tmp_path / 'out'}")
    assert outcome.code == 1
    linked = [f"{day}/{name}" for day in ("day1", "day1 again") for name in ("1.png", "2.jpg", "deep/1.png")]
    assert set(scores_of(tmp_path / "out")) == {"a.png", "b.gif", "c.jfif", "d.ppm", "stack.tif", *linked}
    assert sorted(outcome.err.splitlines())[:3] == [
        f"left out: {source}/gone.png: a link to a file that is missing; restore the file, or remove the link",
        f"left out: {source}/loop: a link to a folder above it; remove it",
        next(
            line for line in outcome.err.splitlines() if "phone.HEIC: this kind of image is not read; convert" in line
        ),
    ]
    assert f"left out: {source}/stack.tif: images 2 to 3 of this file" in outcome.err
    assert outcome.out.startswith("14 images found; importing")
    assert "\n11 of 14 images scored; " in outcome.out
    assert "note: 2 files are no images (first: " in outcome.out


def test_an_image_that_the_runs_transform_refuses(tmp_path):
    make_mvtec(tmp_path / "data", size=40)
    crop = "data.transform=[{_target_: albumentations.CenterCrop, height: 32, width: 32}]"
    result_of(*folder_data(tmp_path / "data"), crop, run_dir=tmp_path / "run")
    save_image(tmp_path / "in" / "a.png", size=40)
    small = save_image(tmp_path / "in" / "b.png", size=20)
    outcome = predict(f"run={tmp_path / 'run'}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    assert outcome.code == 1
    assert outcome.err.startswith(f"left out: {small}: data.transform: CenterCrop can't be applied (")
    assert list(scores_of(tmp_path / "out")) == ["a.png"]
