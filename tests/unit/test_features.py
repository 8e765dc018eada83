"""The features of frozen backbones: in memory, in files that runs share, and what happens where there can be none."""

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_lite.data.transforms import Pipeline, Resize
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.cache import FeatureFiles, FeatureStore, compact, image_key, key, shapes, table
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import folder_data, result_of, train

RESNET = "resnet18.tv_in1k"
CPU = torch.device("cpu")


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


def levels_of(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(count, 4, 5, 6).to(dtype).float(), torch.randn(count, 8, 2, 3).to(dtype).float()]


# --- what is kept ---


def test_store_gives_what_was_put_in():
    levels, paths = levels_of(7), [f"image{i}" for i in range(7)]
    store = FeatureStore(shapes(levels))
    assert store.shapes == [(5, 6, 4), (2, 3, 8)]
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        store.add(paths[rows], table([x[rows] for x in levels], torch.float32))
    assert store.holds(paths)
    assert not store.holds(["image0", "elsewhere"])
    for some in ([6, 0, 3], [2], [1, 1]):
        for found, level in zip(store.get([paths[i] for i in some]), levels, strict=True):
            assert torch.equal(found, level[some])
            assert found.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(KeyError):
        store.get(["elsewhere"])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_files_give_what_was_written(name, tmp_path):
    dtype = getattr(torch, name)
    levels = levels_of(5, dtype)
    files = FeatureFiles(tmp_path, {"a": 1})
    keys = {f"image{i}": f"key{i}" for i in range(5)}
    with files.writer() as writer:
        writer.reserve(shapes(levels), dtype, 5)
        writer.add(["key0", "key1", "key2"], [level[:3] for level in levels])
        writer.add(["key3", "key4"], [torch.cat([level[3:], level[:1]]) for level in levels])  # filled up: cut off
    store = files.load(keys | {"new": "other"})
    assert set(store.rows) == set(keys)
    for found, level in zip(store.get(["image4", "image0"]), levels, strict=True):
        assert torch.equal(found, level[[4, 0]])
    assert not FeatureFiles(tmp_path, {"a": 2}).load(keys).rows


def test_type_without_loss():
    assert compact(levels_of(2, torch.bfloat16)) == torch.bfloat16
    assert compact(levels_of(2)) == torch.float32


def test_key_holds_everything_that_features_depend_on(tmp_path):
    def make(layers=(2, 3), seed=0, precision="32", size=32, resample="bilinear", normalize="imagenet", kind="auto"):
        torch.manual_seed(seed)
        backbone = Backbone(RESNET, list(layers), "none", precision)
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


def test_runs_share_what_they_have_in_common(root, cache, tmp_path):
    """A category, then both of them, another method, another seed, another image, another size."""
    both = "[bottle,cable]"
    assert run(root, cache, tmp_path / "1")["cache"] | {"gb": 0} == {
        "used": True, "images": 12, "computed": 12, "gb": 0, "type": "float32",
    } | {"type": run(root, cache, tmp_path / "2")["cache"]["type"]}  # fmt: skip
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
    short = run(root, cache, tmp_path / "short", *how, "cache.type=float16")
    assert short["cache"]["type"] == "float16"


def test_a_method_that_needs_images_too(root, cache, tmp_path):
    """ReContrast: E_f's features come from the cache, E_t sees the images."""
    scores = []
    for name, more in (
        ("cold", ()),
        ("warm", ()),
        ("without", ("cache.enabled=false", "hardware.feature_memory_gb=0")),
    ):
        how = ("method=recontrast", "trainer.max_epochs=1", "data.image_size=64", f"cache.folder={cache}", *more)
        found = result_of(*folder_data(root), *how, run_dir=tmp_path / name)["cache"]
        assert (found["used"], found.get("computed")) == {
            "cold": (True, 12), "warm": (True, 0), "without": (False, None),
        }[name]  # fmt: skip
        scores.append(np.genfromtxt(tmp_path / name / "scores.csv", delimiter=",")[1:, -1])
    assert np.array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], scores[2], rtol=1e-2)


def test_validation_images_are_not_taken_from_it(root, cache, tmp_path):
    """Held-out images get an artificial defect under the path of a clean one that another run has left."""
    run(root, cache, tmp_path / "all")
    how = ("data.val_fraction=0.5", "hardware.precision=32")
    one, two = (run(root, cache, tmp_path / n, *how, f"cache.enabled={n}") for n in ("true", "false"))
    assert one["validation"] == pytest.approx(two["validation"], abs=1e-9)


@pytest.mark.slow
def test_jobs_of_a_sweep_share_it(root, cache, tmp_path):
    """Five at two a time: computed once, whoever is first."""
    sweep = tmp_path / "sweep"
    arguments = ("method=norm_occ", "method.norm=0.1,0.2,0.3,0.4,0.5", "hardware.threads=1", f"cache.folder={cache}")
    outcome = train("-m", *folder_data(root), *arguments, "hydra.launcher.jobs=2", f"hydra.sweep.dir={sweep}")
    assert outcome.code == 0, outcome.err
    reports = [json.loads((sweep / str(i) / "result.json").read_text())["cache"] for i in range(5)]
    assert sorted(report["computed"] for report in reports) == [0, 0, 0, 0, 12]
    assert all(report["used"] for report in reports)
    assert len(list(cache.glob("*/*.features"))) == 1


# --- a writer that is killed, files that are damaged, disks that are full ---


def write_halting(cache: Path, pause: float, halfway: Any) -> None:
    files = FeatureFiles(cache, {})
    with files.locked(), files.writer() as writer:
        levels = [torch.ones(2, 3, 4, 4)]
        writer.reserve(shapes(levels), torch.float32, 4)
        writer.add(["a", "b"], levels)
        halfway.set()
        time.sleep(pause)
        writer.add(["c", "d"], levels)


def started(cache: Path, pause: float) -> Any:
    context = multiprocessing.get_context("fork")
    halfway = context.Event()
    process = context.Process(target=write_halting, args=(cache, pause, halfway))
    process.start()
    assert halfway.wait(30)
    return process


def test_a_killed_writer_leaves_nothing(tmp_path):
    process = started(tmp_path, 60)
    process.kill()
    process.join()
    files = FeatureFiles(tmp_path, {})
    assert not files.load({"image": "a"}).rows
    with files.locked():  # at once: the lock went with its owner
        files.sweep()
    assert not list(files.folder.glob("*.features"))


def test_a_second_writer_waits_for_the_first(tmp_path):
    process = started(tmp_path, 0.5)
    files, start = FeatureFiles(tmp_path, {}), time.monotonic()
    with files.locked():
        assert time.monotonic() - start > 0.3
        assert files.load({"image": "c"}).get(["image"])[0].sum() == 48
    process.join()
    assert process.exitcode == 0


def damage(cache: Path, how: str) -> None:
    file = next(cache.glob("*/*.features"))
    index = file.with_suffix(".json")
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "gone":
        file.unlink()
    elif how == "a hole":
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            stream.write(bytes(64))
    elif how == "no json":
        index.write_text("{")
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"type": "float1"}))


@pytest.mark.parametrize("how", ["truncated", "gone", "a hole", "no json", "another version"])
def test_damaged_files_are_computed_again(how, root, cache, tmp_path):
    right = run(root, cache, tmp_path / "1")
    damage(cache, how)
    again = run(root, cache, tmp_path / "2")
    assert again["cache"]["computed"] == 12
    assert (tmp_path / "2" / "scores.csv").read_bytes() == (tmp_path / "1" / "scores.csv").read_bytes()
    assert again["metrics"] == right["metrics"]
    assert (tmp_path / "2" / "train.log").read_text().count(" WARNING ") == 1
    assert run(root, cache, tmp_path / "3")["cache"]["computed"] == 0


def test_a_folder_that_cannot_be(root, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(root, tmp_path / "file" / "cache", tmp_path / "run")
    assert not result["cache"]["used"]
    assert (tmp_path / "run" / "train.log").read_text().count("the feature cache is not used: ") == 1
    without = run(root, tmp_path / "file", tmp_path / "without", "cache.enabled=false")
    assert result["metrics"] == pytest.approx(without["metrics"])


def test_a_full_disk(root, cache, tmp_path, monkeypatch):
    """No file may grow beyond what a small part of the features needs: as on a full disk, writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = FeatureFiles.writer

    def limited(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return original(self)

    monkeypatch.setattr(FeatureFiles, "writer", limited)
    monkeypatch.setattr("anomalib_lite.features.precompute.FrozenFeatures._in_memory", lifted(limits))
    try:
        result = run(root, cache, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not result["cache"]["used"]
    assert not list(cache.glob("*/*.features"))
    assert (tmp_path / "run" / "train.log").read_text().count("the feature cache is not used: ") == 1
    assert result["metrics"] == pytest.approx(run(root, cache, tmp_path / "right")["metrics"])


def lifted(limits):
    from anomalib_lite.features.precompute import FrozenFeatures

    in_memory = FrozenFeatures._in_memory

    def method(self, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return in_memory(self, *arguments)

    return method


def test_what_was_used_longest_ago_goes_first(root, cache, tmp_path):
    first = run(root, cache, tmp_path / "1")["cache"]["gb"]
    size = sum(file.stat().st_size for file in cache.glob("*/*.features"))
    assert first == round(size / 2**30, 3)
    run(root, cache, tmp_path / "2", "seed=1")
    old, new = sorted(cache.glob("*/*.features"), key=lambda file: file.stat().st_mtime)
    os.utime(old, (1, 1))
    run(root, cache, tmp_path / "3", "seed=2", f"cache.limit_gb={2.5 * size / 2**30}")
    left = list(cache.glob("*/*.features"))
    assert len(left) == 2
    assert new in left
    assert old not in left
    small = run(root, cache, tmp_path / "4", "seed=3", f"cache.limit_gb={0.5 * size / 2**30}")
    assert not small["cache"]["used"]
    assert "cache.limit_gb" in small["cache"]["why"]
    assert set(left) == set(cache.glob("*/*.features"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("cache.enabled=maybe", "cache.enabled=maybe: give true or false"),
        ("cache.limit_gb=-1", "cache.limit_gb=-1: give gigabytes from 0"),
        ("cache.type=int8", "cache.type=int8: give auto, bfloat16, float16 or float32"),
        ("cache.folder=3", "cache.folder=3: give a folder, or null"),
    ],
)
def test_options_that_mean_nothing(argument, message):
    outcome = train(argument)
    assert (outcome.code, outcome.err) == (2, f"error: {message}\n")
