"""CIFAR-10 with one class against nine: the reader in both layouts, and runs with a global feature."""

import functools
import shutil

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.comparison.datasets import root_of
from anomalib_lite.comparison.find_runs import Run, config_of
from anomalib_lite.data import splits
from anomalib_lite.data.cifar10 import BATCHES, CLASSES, FILES, read_cifar10, unpacked_root
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import load_rgb
from tests.helpers import run_programs as runs
from tests.helpers.cifar_trees import TEST, TRAIN, make_batches, make_folders
from tests.unit import test_readers

COUNTS = (
    "cat: 10 train images, officially 5000; 2 good test images, officially 1000; 18 defective test images, officially "
    "9000"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("cifar") / "data")


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """The root of torchvision's batches, an empty cache, and the images."""
    monkeypatch.setenv("ANOMALIB_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data", make_batches(tmp_path / "data", monkeypatch)


def refused(message, root, category="cat"):
    test_readers.refused(message, read_cifar10, root, category)


def assert_one_against_nine(data, name="cat"):
    assert {(s.category, s.defect, s.label, s.mask) for s in data.train} == {(name, "good", 0, None)}
    assert len(data.train) == TRAIN
    assert all(s.path.parent == data.root / "train" / name for s in data.train)
    kinds = [(s.path.parent.name, s.defect, s.label) for s in data.test]
    expected = [(name, "good", 0)] + [(other, other, 1) for other in CLASSES if other != name]
    assert sorted(set(kinds)) == sorted(expected)
    assert all(kinds.count(kind) == TEST for kind in expected)
    assert len({s.path for s in data.test}) == len(data.test)


def test_folders(root):
    data = read_cifar10(root, "cat")
    assert data.root == root
    assert_one_against_nine(data)
    assert data.notes == [
        "one-class protocol: cat normal, the test images of the other 9 classes abnormal",
        "cat: no ground_truth, pixel metrics are left out",
        COUNTS,
    ]


def test_batches_are_unpacked_once_and_without_loss(batches):
    base, images = batches
    data = read_cifar10(base, "cat")
    assert data.root == unpacked_root()
    assert_one_against_nine(data)
    train = np.concatenate([images[name] for name in FILES[:5]])
    for part, of_part, samples in (("train", train, data.train), ("test", images["test_batch"], data.test)):
        for sample in samples:  # a file's name is its position
            assert sample.path.parent.parent == data.root / part
            assert (load_rgb(sample.path) == of_part[int(sample.path.stem)]).all()
    times = {sample.path: sample.path.stat().st_mtime_ns for sample in data.train}
    again = read_cifar10(shutil.move(base, base.with_name("moved")), "cat")
    assert times == {sample.path: sample.path.stat().st_mtime_ns for sample in again.train}
    assert [path.name for path in data.root.parent.iterdir()] == [data.root.name]  # no draft is left


def test_several_normal_classes(root):
    data = read_cifar10(root, ["cat", "dog"])
    for name in ("cat", "dog"):
        test = [s for s in data.test if s.category == name]
        assert {s.path.parent.name for s in test if not s.label} == {name}
        assert {s.path.parent.name for s in test if s.label} == set(CLASSES) - {"cat", "dog"}
    assert "16 defective test images, officially 8000" in data.notes[-1]


def test_faults(root, batches, tmp_path):
    base, _ = batches
    refused("data.root is not set", None)
    refused(": neither cifar-10-batches-py nor folders of images .*; set data.root to", base.parent)
    refused(f"these are the batches; set data.root to the folder that holds {BATCHES}", base / BATCHES)
    refused("no category 'plane'; did you mean 'airplane'", root, "plane")
    refused("all ten classes are normal, so none is abnormal", root, "all")
    damaged = base / BATCHES / "data_batch_3"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    refused(f"{BATCHES}: the files are not CIFAR-10's .*; extract cifar-10-python.tar.gz again", base)
    damaged.unlink()
    refused("data_batch_3: no such file; extract cifar-10-python.tar.gz again", base)
    assert not list(unpacked_root().parent.iterdir())

    copy = shutil.copytree(root, tmp_path / "copy")
    for file in (copy / "train" / "cat").iterdir():
        file.unlink()
    refused("train/cat: no training images; put", copy)
    shutil.rmtree(copy / "test" / "dog")
    (copy / "test" / "zebra").mkdir()
    notes = read_cifar10(copy, "frog").notes
    assert "16 defective test images, officially 9000" in notes[2]
    assert notes[3] == f"1 files or folders are not used (first: {copy / 'test' / 'zebra'})"
    for name in CLASSES:
        shutil.rmtree(copy / "train" / name)
    refused("no category in this folder; put images into train/CLASS", copy)


def test_shots_and_held_out_images(root):
    shots = functools.partial(splits.few_shots, shots=4)
    data = AnomalyDataModule(read_cifar10, root, "cat", "cifar10", 32, 2, 4, val_fraction=0.5, split=shots)
    data.setup()
    assert data.train_counts == {"cat": 2}
    assert sorted(s.label for s in data.val_samples) == [0, 1]
    assert data.test_counts == {"cat": {"good": TEST, "defective": 9 * TEST}}
    assert data.has_masks == {"cat": False}


def test_check_only(root, tmp_path):
    outcome = runs.train("data=cifar10", f"data.root={root}", "data.category=frog", "data.check=only",
                         f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == f"cifar10 in {root}"
    assert {"frog: 10 training images, 20 test images", "  test cat: 2 images, 0 masks"} <= set(lines)


@pytest.mark.parametrize("method", ["norm_occ", "norm_occ_closed_form"])
def test_image_level_run(method, batches, tmp_path):
    """From torchvision's batches to metrics, within rounding the same without the cache; predict scores alike."""
    base, _ = batches
    given = (f"method={method}", "method.global_feature=true", "hardware.precision=32",
             "data=cifar10", f"data.root={base}", "data.category=truck")  # fmt: skip
    result = runs.result_of(*given, run_dir=tmp_path / "run")
    assert 0 <= result["metrics"]["image_auroc"] <= 1
    assert result["metrics"]["pixel_auroc"] is None
    assert any(note.startswith("one-class protocol: truck normal") for note in result["notes"])
    assert any("its map is constant" in note for note in result["notes"])
    assert result["cache"]["gb"] < 1e-3
    runs.result_of(*given, "cache.enabled=false", run_dir=tmp_path / "uncached")
    scores = {name: runs.scores_of(tmp_path / name) for name in ("run", "uncached")}
    assert scores["run"] == pytest.approx(scores["uncached"], rel=1e-5)
    maps = np.load(tmp_path / "run" / "maps.npz")["maps"].astype(float)
    assert np.ptp(maps, axis=(1, 2)) == pytest.approx(np.zeros(len(maps)), abs=2e-3)
    assert len(np.unique(maps[:, 0, 0])) > 5
    assert root_of(Run(tmp_path / "run", result, config_of(tmp_path / "run", result), [])) == unpacked_root()

    folder = unpacked_root() / "test" / "truck"
    runs.succeeded(runs.predict(f"run={tmp_path / 'run'}", f"input={folder}", f"output={tmp_path / 'out'}"))
    predicted = runs.scores_of(tmp_path / "out")
    assert predicted == pytest.approx({file: scores["run"][f"test/truck/{file}"] for file in predicted}, rel=1e-4)
    assert len(predicted) == TEST
    assert Image.open(next((tmp_path / "out" / "heatmaps").iterdir())).size == (32, 32)
