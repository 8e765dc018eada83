"""Runs whose files lie elsewhere now, runs on another test set, and resume=true in a folder without a run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_lite.comparison import find_runs
from anomalib_lite.runs.folder import stored_config
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import interrupted_after
from tests.helpers.run_programs import assert_refused, scores_of
from tests.helpers.written_runs import compare

BACKBONE = "test_resnet.r160_in1k"  # the smallest one


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data"), train=8, good=3, defects={"broken": 3}).parent


@pytest.fixture
def files(tmp_path):
    """A split's list of half of the training images, and a file of weights."""
    listed = tmp_path / "first" / "list.txt"
    listed.parent.mkdir()
    listed.write_text("".join(f"bottle/train/good/{i:03d}.png\n" for i in range(4)))
    torch.manual_seed(0)
    save_file(timm.create_model(BACKBONE, num_classes=0).state_dict(), tmp_path / "first" / "weights.safetensors")
    return tmp_path / "first"


def options(root: Path, files: Path) -> list[str]:
    backbone = [f"backbone.name={BACKBONE}", f"backbone.weights={files / 'weights.safetensors'}"]
    return [*runs.folder_data(root), *backbone, "split=file", f"split.path={files / 'list.txt'}"]


@pytest.fixture
def moved(root, files, tmp_path):
    """A finished run, and the folder where its files lie now."""
    runs.result_of(*options(root, files), run_dir=tmp_path / "run")
    return files.rename(tmp_path / "second")


def test_evaluate_with_moved_files(moved, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    again = (f"run={run}", f"output={out}")
    assert_refused(runs.evaluate(*again), "list.txt: No such file or directory; give the file of the split")
    listed = f"split.path={moved / 'list.txt'}"
    wrong = tmp_path / "wrong"
    wrong.write_text("bottle/train/good/000.png\n")
    assert_refused(runs.evaluate(*again, f"split.path={wrong}"), f"split.path={wrong} may have changed")
    assert_refused(runs.evaluate(*again, listed, f"backbone.weights={wrong}"), "another content than")
    assert_refused(runs.evaluate(*again, listed, f"backbone.weights={tmp_path / 'no'}"), "no such file or folder")
    assert_refused(runs.evaluate(*again, listed, "backbone.weights=none"), "another kind of value")
    assert_refused(runs.evaluate(*again, listed, "backbone.name=resnet50"), "another kind of value")
    shutil.rmtree(out)
    runs.succeeded(runs.evaluate(*again, listed, f"backbone.weights={moved / 'weights.safetensors'}"))
    assert scores_of(out) == scores_of(run)


def test_a_run_without_hashes(moved, tmp_path):
    """As version 0.2 and before left it: the list is judged by the images, weights by their path."""
    run, out = tmp_path / "run", tmp_path / "out"
    stored = json.loads(stored_config(run).read_text())
    assert sorted(stored.pop("digests")) == ["backbone.weights", "split.path"]
    stored_config(run).write_text(json.dumps(stored))
    again = (f"run={run}", f"output={out}", f"split.path={moved / 'list.txt'}")
    weights = f"backbone.weights={moved / 'weights.safetensors'}"
    assert_refused(runs.evaluate(*again, weights), "the run stored no hash of its content")
    outcome = runs.evaluate(*again)  # the checkpoint has the weights
    assert outcome.code == 0, outcome.err
    assert scores_of(out) == scores_of(run)


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_resume_with_moved_files(with_checkpoint, root, files, tmp_path):
    run, budget = tmp_path / "run", ("trainer.max_epochs=3", "trainer.log_every=1", "trainer.checkpoint_minutes=0")
    with interrupted_after(2):
        runs.train(*options(root, files), *budget, f"hydra.run.dir={run}")
    else_where = f"output={tmp_path / 'none'}"
    assert_refused(runs.evaluate(f"run={run}", else_where), "its training has not ended; resume=true hydra.run.dir=")
    if not with_checkpoint:  # as if it had been killed before the first one
        (run / "checkpoints" / "last.ckpt").unlink()
    moved = files.rename(tmp_path / "second")
    wrong = shutil.copytree(moved, tmp_path / "wrong")
    (wrong / "weights.safetensors").write_bytes(b"other")
    resumed = (*budget, "resume=true", f"hydra.run.dir={run}")
    assert_refused(runs.train(*options(root, wrong), *resumed), "weights.safetensors: another content than")
    runs.succeeded(runs.train(*options(root, moved), *resumed))
    runs.result_of(*options(root, moved), *budget, run_dir=tmp_path / "expected")
    assert scores_of(run) == scores_of(tmp_path / "expected")
    assert json.loads(stored_config(run).read_text())["config"]["split"]["path"] == str(moved / "list.txt")


# --- another test set ---


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    runs.result_of(*runs.folder_data(root), run_dir=run)
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other test images of the category, without training images."""
    root = tmp_path_factory.mktemp("other")
    folder = make_mvtec(root, train=1, good=5, defects={"bent": 4, "broken": 2})
    shutil.rmtree(folder / "train")
    return root


@pytest.mark.parametrize("below", ["", "bottle"])
def test_another_test_set(below, trained, other, tmp_path):
    """Its scores are those of predict; the thresholds are the run's, and the result says what it is of."""
    out, root = tmp_path / "out", other / below
    outcome = runs.evaluate(f"run={trained}", f"output={out}", f"data.root={root}")
    assert (outcome.code, outcome.err) == (0, "")
    first, result = (json.loads((run / "result.json").read_text()) for run in (trained, out))
    assert result["thresholds"] == first["thresholds"]
    assert result["data"]["test_counts"] == {"bottle": {"good": 5, "defective": 6}}
    assert result["data"]["train_counts"] == first["data"]["train_counts"]
    assert result["test_set"] == {"root": str(root), "of": "folder"}
    assert result["dataset"] == f"folder, test set {root.name}"
    assert any(note.startswith("another test set than the run's") for note in result["notes"])
    predicted = tmp_path / "predicted"
    assert runs.predict(f"run={trained}", f"input={other / 'bottle' / 'test'}", f"output={predicted}").code == 0
    ours = {Path(path).parts[-2:]: score for path, score in scores_of(out).items()}
    theirs = {Path(path).parts[-2:]: score for path, score in scores_of(predicted).items()}
    assert ours == pytest.approx(theirs, rel=1e-5)
    table = compare(trained, out)
    assert table.code == 0, table.err
    assert table.out.count("norm_occ ") >= 2
    assert f"folder, test set {root.name}" in table.out


def test_the_same_data_elsewhere_are_no_other_test_set(trained, root, tmp_path, monkeypatch):
    """With relative paths, which compare finds from another folder."""
    shutil.copytree(root, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        runs.succeeded(runs.evaluate(f"run={os.path.relpath(trained)}", "output=out", "data.root=copy"))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["dataset"] == "folder"
    assert "test_set" not in result
    assert find_runs.config_of(tmp_path / "out", result)["data"]["root"] == str(tmp_path / "copy")
    assert scores_of(tmp_path / "out") == scores_of(trained)


def test_another_test_set_with_training_images(trained, tmp_path):
    """Its training images are not read: thresholds stay the run's, whatever lies there."""
    folder = make_mvtec(tmp_path / "data", train=3, good=2, defects={"broken": 2})
    (folder / "train" / "good" / "000.png").write_bytes(b"")
    runs.succeeded(runs.evaluate(f"run={trained}", f"output={tmp_path / 'out'}", f"data.root={tmp_path / 'data'}"))
    first, result = (json.loads((run / "result.json").read_text()) for run in (trained, tmp_path / "out"))
    assert result["thresholds"] == first["thresholds"]
    assert result["data"]["test_counts"] == {"bottle": {"good": 2, "defective": 2}}


def test_other_test_sets_that_are_refused(trained, other, tmp_path):
    again = (f"run={trained}", f"output={tmp_path / 'out'}")
    for more, message in (
        ((f"data.root={tmp_path / 'no'}",), "no: no such folder"),
        ((f"data.root={tmp_path}",), "none of the run's categories, bottle"),
        (
            (f"data.root={other}", "scoring.pixel_smooth=2"),
            "scoring.pixel_smooth=2: another test set has the",
        ),
    ):
        assert_refused(runs.evaluate(*again, *more), message)
    runs.succeeded(runs.evaluate(*again, f"data.root={other}", "scoring.fpr_limits=[0.1]"))


# --- resume=true ---


@pytest.mark.parametrize("command", ["alone", "sweep"])
def test_resume_without_a_run_says_so(command, root, tmp_path):
    """A sweep says resume=true to jobs that have not started: they start, and nothing is amiss."""
    sweep = ("-m", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=run")
    place = (f"hydra.run.dir={tmp_path / 'run'}",) if command == "alone" else sweep
    outcome = runs.succeeded(runs.train(*runs.folder_data(root), "resume=true", *place))
    line = f"hydra.run.dir={tmp_path / 'run'}: no run to resume in this folder, so this run starts from the beginning"
    assert outcome.out.count(line) == (command == "alone")
    assert (tmp_path / "run" / "result.json").is_file()
