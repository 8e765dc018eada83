"""The features of frozen backbones: in memory, in files that runs share, and what happens where there can be none."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.data.transforms import Resize
from anomalib_lite.features import cache as cache_module
from anomalib_lite.features import precompute
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.cache import FeatureFiles, image_key, key, on_network
from anomalib_lite.features.precompute import as_rows, shapes_of, smallest_type
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import folder_data, method, result_of, succeeded, train

CPU = torch.device("cpu")
PIPELINE = Pipeline([Resize(32)], (), "imagenet")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle")
    make_mvtec(root, "cable", train=5, good=2, defects={"bent": 2})
    return root


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def run(root: Path, cache: Path, run_dir: Path, *arguments: str, category: str = "bottle"):
    few = ("method=norm_occ", "trainer.max_epochs=1", "hardware.threads=1", f"cache.folder={cache}")
    return result_of(*folder_data(root, category), *few, *arguments, run_dir=run_dir)


@pytest.fixture(scope="module")
def usual(root, tmp_path_factory):
    """The folder of a run, with the features that it has stored in `cache`."""
    folder = tmp_path_factory.mktemp("usual")
    run(root, folder / "cache", folder)
    return folder


@pytest.fixture
def filled(usual, cache):
    """The result of the usual run; the cache folder holds what it has stored."""
    shutil.copytree(usual / "cache", cache)
    return json.loads((usual / "result.json").read_text())


def levels_of(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(count, 4, 5, 6).to(dtype).float(), torch.randn(count, 8, 2, 3).to(dtype).float()]


# --- what is kept ---


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_files_give_what_was_written(name, tmp_path):
    dtype = getattr(torch, name)
    levels, files = levels_of(5, dtype), FeatureFiles(tmp_path, {"a": 1})
    rows, shapes = as_rows(levels, dtype), shapes_of(levels)
    assert shapes == [(5, 6, 4), (2, 3, 8)]
    files.write(["key0", "key1", "key2"], rows[:3], shapes)
    files.write(["key3", "key4"], rows[3:], shapes)
    assert len({file.stat().st_mode for file in files.folder.iterdir()}) == 1  # who can read key.txt can read them
    stored = StoredFeatures(PIPELINE)
    files.load({f"image{i}": f"key{i}" for i in range(5)} | {"new": "other"}, stored)
    assert set(stored.places) == {f"image{i}" for i in range(5)}
    assert stored.shapes == shapes
    assert stored.holds(["image4", "image0"])
    assert not stored.holds(["image0", "new"])
    for i in range(5):
        assert stored.row(f"image{i}").dtype == dtype
        assert torch.equal(
            stored.row(f"image{i}"), torch.cat([x[i].movedim(0, -1).flatten() for x in levels]).to(dtype)
        )
    other = StoredFeatures(PIPELINE)
    FeatureFiles(tmp_path, {"a": 2}).load({"image0": "key0"}, other)
    assert not other.places


def test_reading_deletes_no_file(tmp_path, monkeypatch, caplog):
    """Neither where the files belong to somebody else, nor what another run is writing."""
    files, levels = FeatureFiles(tmp_path, {}), levels_of(1)
    files.write(["key0"], as_rows(levels, torch.float32), shapes_of(levels))
    (files.folder / "x.part.safetensors").write_text("incomplete")
    before = sorted(files.folder.iterdir())

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    files.load({"image0": "key0"}, stored := StoredFeatures(PIPELINE))
    assert stored.holds(["image0"])
    assert sorted(files.folder.iterdir()) == before
    assert not caplog.records


def test_type_without_loss():
    assert smallest_type(levels_of(2, torch.bfloat16)) == torch.bfloat16
    assert smallest_type(levels_of(2)) == torch.float32


def test_key_holds_everything_that_features_depend_on(tmp_path):
    def make(layers=(2, 3), seed=0, precision="32", size=32, resample="bilinear", normalize="imagenet", kind="auto"):
        torch.manual_seed(seed)
        backbone = Backbone("test_resnet.r160_in1k", list(layers), "none", precision)
        return json.dumps(key(backbone, Pipeline([Resize(size, resample)], (), normalize), CPU, kind), sort_keys=True)

    first = make()
    assert make() == first
    others = [
        make(layers=(1, 2)), make(seed=1), make(precision="bf16"), make(size=48), make(resample="lanczos"),
        make(normalize="none"), make(kind="float16"),
    ]  # fmt: skip
    assert len({first, *others}) == 8
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert make() != first
    finally:
        torch.set_num_threads(threads)


def test_image_key(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    first = image_key(file)
    assert image_key(str(file)) == first
    os.utime(file, (1, 1))
    later = image_key(file)
    file.write_bytes(b"four")
    os.utime(file, (1, 1))
    (tmp_path / "b.png").write_bytes(b"one")
    os.utime(tmp_path / "b.png", (1, 1))
    assert len({first, later, image_key(file), image_key(tmp_path / "b.png")}) == 4


# --- runs that share it ---


def test_runs_share_what_they_have_in_common(root, cache, filled, tmp_path):
    """A category, then both of them, another method, another seed, another image, another size."""
    both, first = "[bottle,cable]", filled["cache"]
    assert {key: first[key] for key in ("used", "images", "computed")} == {"used": True, "images": 12, "computed": 12}
    assert run(root, cache, tmp_path / "2")["cache"] == first | {"computed": 0}
    assert run(root, cache, tmp_path / "3", category=both)["cache"]["computed"] == 9
    assert run(root, cache, tmp_path / "4", "method=norm_occ_closed_form", category=both)["cache"]["computed"] == 0
    assert run(root, cache, tmp_path / "5", "data.image_size=48")["cache"]["computed"] == 12
    assert run(root, cache, tmp_path / "6", "seed=1")["cache"]["computed"] == 12  # other random weights
    copy = tmp_path / "data"
    make_mvtec(copy, "bottle")
    assert run(copy, cache, tmp_path / "7")["cache"]["computed"] == 12
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(copy / "bottle/train/good/000.png")
    assert run(copy, cache, tmp_path / "8")["cache"]["computed"] == 1


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_results_with_and_without(precision, root, cache, tmp_path):
    """Equal within rounding; in a compact type within that type's."""
    how = (f"hardware.precision={precision}", "data.val_fraction=0.5", "data.eval_batch_size=5")
    with_, warm = (run(root, cache, tmp_path / name, *how) for name in ("cold", "warm"))
    without = run(root, cache, tmp_path / "without", *how, "cache.enabled=false")
    assert with_["cache"]["used"]
    assert not without["cache"]["used"]
    assert with_["cache"]["type"] == {"32": "float32", "bf16": "bfloat16"}[precision]
    assert with_["metrics"] == warm["metrics"]
    scores = [np.genfromtxt(tmp_path / n / "scores.csv", delimiter=",")[1:, -1] for n in ("cold", "warm", "without")]
    assert np.array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-5 if precision == "32" else 2e-2)
    short = run(root, cache, tmp_path / "short", *how, "cache.dtype=float16")
    assert short["cache"]["type"] == "float16"


@pytest.mark.parametrize("options", [(), ("scoring.map_size=original",), ("scoring.map_size=[20,24]",)])
def test_a_second_run_decodes_nothing(options, root, cache, tmp_path, monkeypatch):
    """Before its figures, which show some images."""
    from anomalib_lite.runs import run as runs_run

    loads, before_figures, load, write = list[Path](), list[int](), Pipeline.load, runs_run.write_with_extras

    def counted(self, path):
        loads.append(path)
        return load(self, path)

    def noted(*arguments):
        before_figures.append(len(loads))
        return write(*arguments)

    monkeypatch.setattr(Pipeline, "load", counted)
    monkeypatch.setattr(runs_run, "write_with_extras", noted)
    results = []
    for name in "12":
        loads.clear()
        results.append(run(root, cache, tmp_path / name, *options))
    assert before_figures == [12, 0]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_method_that_needs_images_too(root, cache, tmp_path):
    """ReContrast: E_f's features come from the cache, E_t sees the images."""
    scores = []
    for name, more in (
        ("cold", ()),
        ("warm", ()),
        ("without", ("cache.enabled=false", "hardware.feature_memory_gb=0")),
    ):
        how = (*method("recontrast"), "hardware.threads=1", f"cache.folder={cache}", *more)
        found = result_of(*folder_data(root), *how, run_dir=tmp_path / name)["cache"]
        assert (found["used"], found.get("computed")) == {
            "cold": (True, 12), "warm": (True, 0), "without": (False, None),
        }[name]  # fmt: skip
        scores.append(np.genfromtxt(tmp_path / name / "scores.csv", delimiter=",")[1:, -1])
    assert np.array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-2)


def test_validation_images_are_not_taken_from_it(root, cache, filled, tmp_path):
    """Held-out images get an artificial defect under the path of a clean one that another run has left."""
    how = ("data.val_fraction=0.5", "hardware.precision=32")
    one, two = (run(root, cache, tmp_path / n, *how, f"cache.enabled={n}") for n in ("true", "false"))
    assert one["validation"] == pytest.approx(two["validation"], abs=1e-9)


@pytest.mark.slow
def test_jobs_of_a_sweep_share_it(root, cache, tmp_path):
    """Five at two a time: computed once, whoever is first."""
    sweep = tmp_path / "sweep"
    arguments = ("method=norm_occ", "method.norm=0.1,0.2,0.3,0.4,0.5", "hardware.threads=1", f"cache.folder={cache}")
    succeeded(train("-m", *folder_data(root), *arguments, "hydra.launcher.jobs=2", f"hydra.sweep.dir={sweep}"))
    reports = [json.loads((sweep / str(i) / "result.json").read_text())["cache"] for i in range(5)]
    assert sorted(report["computed"] for report in reports) == [0, 0, 0, 0, 12]
    assert all(report["used"] for report in reports)
    assert len(list(cache.glob("*/*.safetensors"))) == 1


# --- a writer that is killed, files that are damaged, disks that are full ---


def extract_until_killed(*arguments: str) -> None:
    """A run in a fork of this process, with two images in a file. It is killed when its third file is half written."""
    torch.set_num_threads(1)  # a fork can't use the threads of its parent
    precompute.BATCH = precompute.CHUNK_IMAGES = 2
    written = list[Path]()

    def save(tensors: dict[str, torch.Tensor], file: Path, about: dict[str, str]) -> None:
        save_file(tensors, file, about)
        written.append(file)
        if len(written) == 3:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    cache_module.save_file = save  # type: ignore[assignment]
    train(*arguments)


def test_a_kill_loses_one_chunk_at_most(root, cache, tmp_path):
    """A run that is killed while it extracts features leaves whole files, and the next run computes the rest."""
    options = (*folder_data(root), "method=norm_occ", "hardware.threads=1", f"cache.folder={cache}")
    arguments = (*options, f"hydra.run.dir={tmp_path / 'killed'}")
    process = multiprocessing.get_context("fork").Process(target=extract_until_killed, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    incomplete = list(cache.glob("*/*.part.safetensors"))
    assert len(incomplete) == 1
    assert len(list(cache.glob("*/*.safetensors"))) == 2 + 1
    report = run(root, cache, tmp_path / "next")["cache"]
    assert report["used"]
    assert report["computed"] == 12 - 2 * 2
    assert not incomplete[0].exists()


def hold_lock(cache: Path, seconds: float, locked: Any) -> None:
    with FeatureFiles(cache, {}).locked():
        for name in (".tmpx9A_zB", "x.part.safetensors"):
            (FeatureFiles(cache, {}).folder / name).write_text("incomplete")
        locked.set()
        time.sleep(seconds)


@pytest.mark.parametrize("killed", [True, False])
def test_one_run_writes_at_a_time(tmp_path, killed):
    """A second writer waits for the first; the lock of a killed one is free at once, and what it left is removed."""
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=hold_lock, args=(tmp_path, 60 if killed else 0.5, locked))
    process.start()
    assert locked.wait(30)
    if killed:
        process.kill()
    start = time.monotonic()
    with FeatureFiles(tmp_path, {}).locked():
        assert (time.monotonic() - start > 0.3) != killed
        assert {file.name for file in tmp_path.glob("*/*")} == {"key.txt", "lock"}
    process.join()


def test_damaged_files_are_computed_again(root, cache, tmp_path, monkeypatch):
    """Four files of three images: one is cut off, one has a hole, one has no header, one says that it holds others."""
    monkeypatch.setattr(precompute, "BATCH", 3)
    monkeypatch.setattr(precompute, "CHUNK_IMAGES", 3)
    right = run(root, cache, tmp_path / "1")
    cut_off, hole, no_header, other = cache.glob("*/*.safetensors")
    os.truncate(cut_off, cut_off.stat().st_size - 1)
    with hole.open("r+b") as stream:
        stream.seek(hole.stat().st_size // 2)
        stream.write(bytes(64))
    no_header.write_bytes(b"{")
    save_file(load_file(other), other, {"about": json.dumps({"images": ["a"], "shapes": [[1, 1, 1]]})})
    again = run(root, cache, tmp_path / "2")
    assert again["cache"]["computed"] == 12
    assert (tmp_path / "2" / "scores.csv").read_bytes() == (tmp_path / "1" / "scores.csv").read_bytes()
    assert again["metrics"] == right["metrics"]
    named = re.findall(r" WARNING .*/(\w+\.safetensors): damaged", (tmp_path / "2" / "train.log").read_text())
    assert sorted(named) == sorted(file.name for file in (cut_off, hole, no_header))
    assert run(root, cache, tmp_path / "3")["cache"]["computed"] == 0


def test_nothing_to_store(caplog):
    """Training images are augmented, and there are no test images: no cache is opened, and no warning is given."""
    data: Any = SimpleNamespace(train_pipeline=None, eval_pipeline=PIPELINE, test_samples=[])
    backbone, trainer = torch.nn.Identity(), SimpleNamespace(strategy=SimpleNamespace(root_device=CPU))
    stored, report = precompute.precompute(trainer, data, backbone, {"enabled": True}, 1)  # type: ignore[arg-type]
    assert (report, stored.places) == ({"used": False}, {})
    assert not caplog.records


def test_ranks_on_different_devices(monkeypatch):
    """The files' key names the device: nothing is computed that the other ranks would not find."""
    strategy = SimpleNamespace(
        root_device=CPU, reduce_boolean_decision=lambda decision: decision, broadcast=lambda own: {"computed": "other"}
    )
    data: Any = SimpleNamespace(eval_pipeline=PIPELINE)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=False)
    monkeypatch.setattr(precompute, "key", lambda *_: {"computed": "own"})
    extraction = precompute.Extraction(trainer, data, torch.nn.Identity(), {"dtype": "auto"}, list, "")  # type: ignore[arg-type]
    _, report = extraction.shared(["a.png"])
    assert report == {"used": False, "why": "the ranks compute on different devices, whose features are not equal"}


def test_no_pass_without_room():
    """With hardware.feature_memory_gb=0 no batch goes through the backbone, for which the device may lack memory."""
    data: Any = SimpleNamespace(eval_pipeline=PIPELINE, train_pipeline=PIPELINE, corrupt=None, test_samples=[])
    data.train_samples = [SimpleNamespace(path="a.png")]
    stored, _ = precompute.precompute(SimpleNamespace(), data, torch.nn.Identity(), {"enabled": False}, 0)  # type: ignore[arg-type]
    assert stored.places == {}


def test_a_folder_that_cannot_be(root, filled, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(root, tmp_path / "file" / "cache", tmp_path / "run")
    assert not result["cache"]["used"]
    assert (tmp_path / "run" / "train.log").read_text().count("the feature cache is not used: ") == 1
    assert result["metrics"] == pytest.approx(filled["metrics"])


def test_a_full_disk(root, usual, cache, tmp_path, monkeypatch):
    """No file may grow beyond what a small part of the features needs: as on a full disk, writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = precompute.in_memory

    def lifted(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return original(*arguments)

    def limited(self, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return write(self, *arguments)

    write = FeatureFiles.write
    monkeypatch.setattr(FeatureFiles, "write", limited)
    monkeypatch.setattr(precompute, "in_memory", lifted)
    try:
        result = run(root, cache, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not result["cache"]["used"]
    assert not list(cache.glob("*/*.safetensors"))
    assert (tmp_path / "run" / "train.log").read_text().count("the feature cache is not used: ") == 1
    right = json.loads((usual / "result.json").read_text())
    assert result["metrics"] == pytest.approx(right["metrics"])


def test_what_was_used_longest_ago_goes_first(root, cache, filled, tmp_path):
    size = sum(file.stat().st_size for file in cache.glob("*/*.safetensors"))
    assert filled["cache"]["gb"] == pytest.approx(size / 2**30, abs=1e-3)
    run(root, cache, tmp_path / "2", "seed=1")
    old, new = sorted(cache.glob("*/*.safetensors"), key=lambda file: file.stat().st_mtime)
    os.utime(old, (1, 1))
    run(root, cache, tmp_path / "3", "seed=2", f"cache.limit_gb={2.5 * size / 2**30}")
    left = list(cache.glob("*/*.safetensors"))
    assert len(left) == 2
    assert new in left
    assert old not in left
    small = run(root, cache, tmp_path / "4", "seed=3", f"cache.limit_gb={0.5 * size / 2**30}")
    assert not small["cache"]["used"]
    assert "cache.limit_gb" in small["cache"]["why"]
    assert set(left) == set(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize(("kind", "stays"), [("nfs4", True), ("ext4", False)])
def test_files_that_another_node_may_read_stay(kind, stays, tmp_path, monkeypatch):
    """On a network file system a page of a deleted file can't be read any more, so that its reader would crash."""
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"disk / ext4 rw 0 0\nhost:/data {str(tmp_path.resolve()).replace(' ', chr(92) + '040')} {kind} rw 0 0\n"
    )
    monkeypatch.setattr(cache_module, "on_network", partial(on_network, mounts=mounts))
    files = FeatureFiles(tmp_path, {})
    old, used = (files.folder / f"{name}.safetensors" for name in ("old", "used"))
    model = tmp_path / "weights" / "model.safetensors"  # the user's
    model.parent.mkdir()
    for file, hours in ((old, 72), (used, 24), (model, 96)):
        file.write_bytes(bytes(1000))
        os.utime(file, (time.time() - 3600 * hours,) * 2)
    with pytest.raises(OSError, match=r"cache.limit_gb.*network") if stays else contextlib.nullcontext():
        files.make_room(1500, 1600)
    assert (old.exists(), used.exists()) == (stays, stays)  # a refusal deletes nothing
    if stays:
        files.make_room(500, 1600)
        assert (old.exists(), used.exists()) == (False, True)
    assert model.exists()
