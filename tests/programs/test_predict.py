"""Prediction from a run's folder alone: any image, damaged ones named, thresholds, and what a user gets wrong."""

import json
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.image_trees import make_mvtec, save_image
from tests.helpers.run_programs import (
    assert_refused,
    folder_data,
    predict,
    python,
    result_of,
    rows_of,
    scores_of,
    succeeded,
)

SMALL = ("data.image_size=64", "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=10, good=3, defects={"broken": 3})
    make_mvtec(root, "wood", train=5, good=2, defects={"scratch": 2})
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    result_of(*folder_data(root), *SMALL, run_dir=run)
    return run


@pytest.fixture(scope="module")
def unified(root, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unified") / "run"
    result_of(*folder_data(root, "[bottle,wood]"), *SMALL, run_dir=run)
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "copied run")


def noise(height: int, width: int, *more: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *more), np.uint8)


PHOTOGRAPHS = {
    "wide.png": lambda: Image.fromarray(noise(700, 1000, 3)),
    "narrow.png": lambda: Image.fromarray(noise(57, 31, 3)),
    "gray.bmp": lambda: Image.fromarray(noise(40, 50)),
    "alpha.webp": lambda: Image.fromarray(noise(64, 64, 4), "RGBA"),
    "deep.png": lambda: Image.fromarray(256 * noise(33, 44).astype(np.uint16)),
    "palette.png": lambda: Image.fromarray(noise(48, 48, 3)).quantize(16),
    "cmyk.jpg": lambda: Image.fromarray(noise(90, 60, 3)).convert("CMYK"),
    "bits.tif": lambda: Image.fromarray(noise(20, 30) > 127),
    "sub/gray alpha.PNG": lambda: Image.fromarray(noise(64, 32, 2), "LA"),
    "sub/wide.png": lambda: Image.fromarray(noise(16, 16, 3)),
    "wide.jpg": lambda: Image.fromarray(noise(65, 63, 3)),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, picture in PHOTOGRAPHS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        picture().save(folder / name)
    (folder / "notes.txt").write_text("not an image: a note counts it")
    save_image(folder / ".hidden" / "000.png")
    return folder


def predicted(run: Path, source: Path, output: Path, *more: str) -> dict[str, float]:
    """A prediction that must succeed; the score of each path."""
    outcome = predict(f"run={run}", f"input={source}", f"output={output}", *more)
    assert (outcome.code, outcome.err) == (0, "")
    return scores_of(output)


@pytest.fixture(scope="module")
def whole(trained, photographs, tmp_path_factory) -> Path:
    """The folder of a prediction of all photographs."""
    folder = tmp_path_factory.mktemp("whole")
    predicted(trained, photographs, folder)
    return folder


def threshold_of(run: Path, category: str = "bottle") -> float:
    return json.loads((run / "result.json").read_text())["thresholds"]["per_category"][category]["image"]


def pictures_in(folder: Path) -> dict[str, tuple[int, int]]:
    """The size (W, H) of each picture below a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): Image.open(file).size for file in files}


# --- any image ---


def test_sizes_modes_and_formats(trained, whole):
    rows = rows_of(whole / "scores.csv")
    assert list(rows[0]) == ["path", "score", "threshold", "decision", "ratio"]
    assert {row["path"] for row in rows} == set(PHOTOGRAPHS)
    threshold = threshold_of(trained)
    for row in rows:
        assert float(row["threshold"]) == threshold
        assert row["decision"] == ("defective" if float(row["score"]) > threshold else "good")
        assert float(row["ratio"]) == float(row["score"]) / threshold
    sizes = {f"{name}.png": picture().size for name, picture in PHOTOGRAPHS.items()}
    assert pictures_in(whole / "heatmaps") == sizes
    assert pictures_in(whole / "overlays") == sizes
    assert {path.name for path in whole.iterdir()} == {"scores.csv", "report.html", "heatmaps", "overlays"}


def test_a_single_image(trained, photographs, whole, tmp_path):
    one = predicted(trained, photographs / "cmyk.jpg", tmp_path)
    assert one == pytest.approx({"cmyk.jpg": scores_of(whole)["cmyk.jpg"]}, rel=1e-6)
    assert pictures_in(tmp_path / "heatmaps") == {"cmyk.jpg.png": (60, 90)}


@pytest.mark.parametrize("options", [["batch_size=1"], ["batch_size=3"], ["workers=1", "batch_size=4"]])
def test_batches_change_nothing(options, trained, photographs, whole, tmp_path):
    assert predicted(trained, photographs, tmp_path, *options) == pytest.approx(scores_of(whole), rel=1e-6)


def test_scores_are_those_of_the_run(trained, root, tmp_path):
    """Up to the last digits: in the run each image lay beside others in its batch."""
    own = {path.removeprefix("bottle/test/"): score for path, score in scores_of(trained).items()}
    assert predicted(trained, root / "bottle" / "test", tmp_path) == pytest.approx(own, rel=1e-6)


def test_again_is_the_same(trained, photographs, whole, tmp_path):
    predicted(trained, photographs, tmp_path)
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert len(files) == 2 + 2 * len(PHOTOGRAPHS)
    assert all((whole / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


# --- damaged images ---


def spoil(folder: Path) -> dict[str, str]:
    """Two good images and four that can't be read; the names of the latter, and what is said of them."""
    for i, name in enumerate(("a.png", "z/b.jpg")):
        save_image(folder / name, seed=i)
    whole = save_image(folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.bmp").write_bytes(b"")
    (folder / "header.png").write_bytes(whole[:8] + bytes(100))
    return {
        "truncated.png": "truncated",
        "text.jpg": "no image",
        "empty.bmp": "the file is empty; copy it again",
        "header.png": "image",
    }


@pytest.mark.parametrize("options", [["batch_size=1"], [], ["workers=1"]])
def test_damaged_images_are_named_and_left_out(options, trained, tmp_path):
    damaged = spoil(tmp_path / "in")
    outcome = predict(f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", *options)
    assert outcome.code == 1
    lines = outcome.err.splitlines()
    assert len(lines) == len(damaged)
    for name, why in damaged.items():
        (line,) = [line for line in lines if name in line]
        assert re.match(rf"left out: {re.escape(str(tmp_path / 'in' / name))}: .*{why}", line), line
    assert [row["path"] for row in rows_of(tmp_path / "out" / "scores.csv")] == ["a.png", "z/b.jpg"]
    assert set(pictures_in(tmp_path / "out" / "overlays")) == {"a.png.png", "z/b.jpg.png"}
    assert "2 of 6 images scored" in outcome.out


@pytest.mark.parametrize("name", ["truncated.png", "text.jpg", "notes.txt"])
def test_a_single_damaged_image(name, trained, tmp_path):
    spoil(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    outcome = predict(f"run={trained}", f"input={tmp_path / name}", f"output={tmp_path / 'out'}")
    assert outcome.code == 1
    assert re.fullmatch(rf"left out: [^\n]*{name}: can't be decoded[^\n]*\n", outcome.err)
    assert rows_of(tmp_path / "out" / "scores.csv") == []


def test_all_damaged(trained, tmp_path):
    for name in spoil(tmp_path / "in"):
        assert (tmp_path / "in" / name).exists()
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in" / "z" / "b.jpg").unlink()
    outcome = predict(f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("left out: ")) == (1, 4)
    assert rows_of(tmp_path / "out" / "scores.csv") == []


# --- many images ---

PEAK = """
from anomalib_lite.predict import main
main()
from anomalib_lite.runs.devices import peak_resident
print(peak_resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(trained, tmp_path):
    """In processes of their own, started in another folder than the run was."""
    first = save_image(tmp_path / "in" / "0000.png", 64)
    peaks = {}
    for count in (100, 1000):
        for i in range(1, count):
            if not (link := tmp_path / "in" / f"{i:04}.png").exists():
                link.hardlink_to(first)
        arguments = [f"run={trained}", "input=in", f"output={count}", "device=cpu"]
        outcome = succeeded(python("-c", PEAK, *arguments, cwd=tmp_path))
        assert len(rows_of(tmp_path / str(count) / "scores.csv")) == count
        peaks[count] = int(outcome.out.split()[-1]) / 2**20
    print(peaks)
    assert peaks[1000] - peaks[100] < 60, peaks


# --- thresholds ---


def test_quantile(trained, root, tmp_path):
    normal = np.load(trained / "maps.npz")["normal/scores"]
    assert len(normal) == 10
    source = root / "bottle" / "train"
    scores = predicted(trained, source, tmp_path / "own")
    np.testing.assert_allclose(sorted(scores.values()), sorted(normal), rtol=1e-6)
    assert float(rows_of(tmp_path / "own" / "scores.csv")[0]["threshold"]) == threshold_of(trained)
    assert threshold_of(trained) == np.quantile(normal, 0.99)
    for quantile in (0.1, 0.5, 1):
        predicted(trained, source, tmp_path / str(quantile), f"quantile={quantile}")
        rows = rows_of(tmp_path / str(quantile) / "scores.csv")
        limit = np.quantile(normal, quantile)
        assert {float(row["threshold"]) for row in rows} == {limit}
        assert {row["path"] for row in rows if row["decision"] == "defective"} == {
            path for path, score in scores.items() if score > limit
        }
    below = [row["decision"] for row in rows_of(tmp_path / "0.1" / "scores.csv")]
    assert below.count("defective") == 9


def test_own_threshold(trained, photographs, whole, tmp_path):
    scores = scores_of(whole)
    limit = sorted(scores.values())[4]
    for name, threshold in (("middle", limit), ("zero", 0), ("below", -1.5)):
        predicted(trained, photographs, tmp_path / name, f"threshold={threshold!r}", "report=0")
        rows = rows_of(tmp_path / name / "scores.csv")
        assert {row["path"]: float(row["score"]) for row in rows} == scores
        assert {row["path"] for row in rows if row["decision"] == "defective"} == {
            path for path, score in scores.items() if score > threshold
        }
        assert {float(row["threshold"]) for row in rows} == {threshold}
        ratios = {row["path"]: row["ratio"] for row in rows}
        if threshold > 0:
            assert {path: float(ratio) for path, ratio in ratios.items()} == {
                p: s / threshold for p, s in scores.items()
            }
        else:
            assert set(ratios.values()) == {""}
        assert not (tmp_path / name / "report.html").exists()
    arguments = [f"run={trained}", f"input={photographs}", f"output={tmp_path / 'both'}", "threshold=1", "quantile=0.9"]
    assert_refused(predict(*arguments), "threshold=1 and quantile=0.9: give one of them")


def test_category_of_a_unified_run(unified, photographs, tmp_path):
    arguments = [f"run={unified}", f"input={photographs}", f"output={tmp_path}"]
    assert_refused(predict(*arguments), "category= is not set: .* bottle, wood; choose one")
    assert_refused(predict(*arguments, "category=cap"), "category=cap: this run's categories are bottle, wood")
    assert not list(tmp_path.iterdir())
    for category in ("bottle", "wood"):
        predicted(unified, photographs, tmp_path / category, f"category={category}")
        rows = rows_of(tmp_path / category / "scores.csv")
        assert {float(row["threshold"]) for row in rows} == {threshold_of(unified, category)}
        predicted(unified, photographs, tmp_path / f"half {category}", f"category={category}", "quantile=0.5")
        stored = np.load(unified / "maps.npz")
        limit = np.quantile(stored["normal/scores"][stored["normal/categories"] == category], 0.5)
        assert float(rows_of(tmp_path / f"half {category}" / "scores.csv")[0]["threshold"]) == limit


def test_category_of_a_run_of_one(trained, photographs, tmp_path):
    predicted(trained, photographs / "gray.bmp", tmp_path / "out", "category=bottle")
    arguments = [f"run={trained}", f"input={photographs}", f"output={tmp_path / 'other'}"]
    assert_refused(predict(*arguments, "category=wood"), "category=wood: this run's categories are bottle")


# --- where things lie ---


def test_nothing_but_the_runs_folder_is_needed(root, tmp_path, monkeypatch, photographs):
    """Not the training data, not the place where it was trained, nor the one where the run lay."""
    data = shutil.copytree(root, tmp_path / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result_of("data=folder", "data.root=../data", "data.category=bottle", *SMALL, run_dir=Path("run"))
    scores = predicted(Path("run"), photographs, Path("out"))
    shutil.rmtree(data)
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here" / "run", tmp_path / "there" / "moved")
    monkeypatch.chdir(tmp_path / "there")
    assert predicted(Path("moved"), photographs, Path("out"), "quantile=0.5") == scores
    monkeypatch.chdir(tmp_path / "there" / "moved")
    assert predicted(Path(), photographs, Path("../again")) == scores


def test_own_method(root, tmp_path, monkeypatch, caplog):
    """A file in the current folder is found, as in training; from another folder, it is found where it lay; without it
    one line names it. Its maps keep their place: this one's are the brightness."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("# @package _global_\nmethod:\n  _target_: own_one.Mine\n")
    (tmp_path / "own_one.py").write_text(
        "from anomalib_lite.methods.base import AnomalyModule\n\n\nclass Mine(AnomalyModule):\n"
        "    def anomaly_map(self, batch):\n        return batch['image'].mean(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = [
        "scoring.pixel_smooth=null",
        "--config-dir",
        str(tmp_path / "conf"),
        "method=mine",
        "backbone=none",
        *SMALL,
    ]
    result_of(*folder_data(root), *options, run_dir=tmp_path / "run")
    source = root / "bottle" / "test"
    predicted(tmp_path / "run", source, tmp_path / "out")
    picture = np.zeros((300, 200, 3), np.uint8)
    picture[200:260, 20:80] = 255
    Image.fromarray(picture).save(tmp_path / "new.png")
    predicted(tmp_path / "run", tmp_path / "new.png", tmp_path / "new")
    heat = np.asarray(Image.open(tmp_path / "new" / "heatmaps" / "new.png.png")).astype(int).sum(-1)
    assert heat[210:250, 30:70].min() > 2 * heat[:150].max()
    assert heat[210:250, 30:70].min() > 2 * heat[:, 130:].max()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.delitem(sys.modules, "own_one")
    scores = predicted(tmp_path / "run", source, tmp_path / "from there")
    assert scores == scores_of(tmp_path / "out")
    assert caplog.messages == [f"the module own_one is read from {tmp_path}, where it lay when the run was started"]
    monkeypatch.delitem(sys.modules, "own_one")
    shutil.move(tmp_path / "own_one.py", tmp_path / "there")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert predicted(tmp_path / "run", source, tmp_path / "moved") == scores
    monkeypatch.delitem(sys.modules, "own_one")
    monkeypatch.chdir(tmp_path)
    outcome = predict(f"run={tmp_path / 'run'}", f"input={source}", f"output={tmp_path / 'other'}")
    assert_refused(
        outcome,
        f"method._target_=own_one.Mine: the module own_one is not found; it lay in {tmp_path} when the run was "
        "started, and is not there now; start in the folder that holds own_one.py, or add this folder to PYTHONPATH",
    )


# --- bad input ---


OPTIONS = {
    "run=": "run= is not set: give run=DIR input=PATH output=DIR",
    "input=": "input= is not set",
    "output=": "output= is not set",
    "run=nowhere": "run=nowhere: no such folder",
    "input=nowhere.png": "input=nowhere.png: no such file or folder",
    "batch_size=0": "batch_size=0: give a whole number from 1",
    "batch_size=true": "batch_size=True: give a whole number from 1",
    "batch_size=[1": r"batch_size=\[1: can't be read",
    "workers=-1": "workers=-1: give a whole number from 0",
    "device=tpu": "device=tpu: choose auto, cpu or gpu",
    "quantile=2": "quantile=2: give a share above 0 and at most 1",
    "quantile=0": "quantile=0: give a share",
    "quantile=high": "quantile=high: give a share",
    "threshold=high": "threshold=high: give a number, such as 0.5",
    "threshold=nan": "threshold=nan: give a number",
    "threshold=true": "threshold=True: give a number",
    "report=-1": "report=-1: give a whole number from 0",
    "watch=maybe": "watch=maybe: give true or false",
    "category=cap": "category=cap: this run's categories are bottle",
    "foo=1": "foo: no such option; see --help",
    "foo": "foo: arguments are KEY=VALUE; see --help",
    "--run": "--run: arguments are KEY=VALUE",
}


@pytest.mark.parametrize("argument", OPTIONS)
def test_options(argument, trained, photographs, tmp_path):
    output = tmp_path / "out"
    outcome = predict(f"run={trained}", f"input={photographs}", f"output={output}", argument)
    assert_refused(outcome, OPTIONS[argument])
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_without_gpu(trained, photographs, tmp_path):
    outcome = predict(f"run={trained}", f"input={photographs}", f"output={tmp_path}", "device=gpu")
    assert_refused(outcome, "device=gpu: no GPU is visible here; choose device=cpu or device=auto")


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver is too old")


@pytest.mark.parametrize(("part", "fails", "message"), [
    ("anomalib_lite.methods.base.AnomalyModule.predict_step", full, "batch_size=32 is too large .* or device=cpu"),
    ("anomalib_lite.methods.base.AnomalyModule.to", full, "no room for the model; give device=cpu"),
    ("torch.cuda.init", too_old, "The NVIDIA driver is too old.* choose device=cpu"),
])  # fmt: skip
def test_a_device_that_cannot_be_used(part, fails, message, trained, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: fails is too_old)
    monkeypatch.setattr(part, fails)
    assert_refused(predict(f"run={trained}", f"input={photographs}", f"output={tmp_path / 'out'}"), message)


def drop(part: str):
    return lambda run: (run / part).unlink()


def write(part: str, content: bytes):
    return lambda run: (run / part).write_bytes(content)


def halve(part: str):
    return lambda run: (run / part).write_bytes((run / part).read_bytes()[: (run / part).stat().st_size // 2])


def change_checkpoint(change):
    def spoil(run: Path) -> None:
        file = run / "checkpoints" / "last.ckpt"
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return spoil


RUNS = {
    "no checkpoint": (drop("checkpoints/last.ckpt"), "last.ckpt: no such file; is run=.* of a finished run"),
    "no configuration": (drop("checkpoints/config.json"), "config.json: no such file; is run=.* of a finished run"),
    "no result": (drop("result.json"), "result.json: no such file; is .* the folder of a finished run"),
    "damaged result": (halve("result.json"), "result.json: not readable as a result"),
    "binary result": (write("result.json", b"\xff\xfe\x00"), "result.json: not readable as a result"),
    "foreign result": (write("result.json", b"{}"), "result.json: not a result of this version"),
    "truncated checkpoint": (halve("checkpoints/last.ckpt"), "last.ckpt: damaged, or not a checkpoint of ours"),
    "text as checkpoint": (write("checkpoints/last.ckpt", b"text"), "last.ckpt: damaged, or not a checkpoint of ours"),
    "empty checkpoint": (write("checkpoints/last.ckpt", b""), "last.ckpt: damaged, or not a checkpoint of ours"),
    "foreign checkpoint": (
        lambda run: torch.save({"state_dict": {}}, run / "checkpoints" / "last.ckpt"),
        "last.ckpt: damaged, or not a checkpoint of ours",
    ),
    "checkpoint of another version": (
        change_checkpoint(lambda content: content["anomalib_lite"].update(version="7.0.1")),
        r"last.ckpt: written by anomalib_lite 7.0.1, this is 0.*; train again",
    ),
    "checkpoint without a tensor": (
        change_checkpoint(lambda content: content["state_dict"].pop("project.weight")),
        "last.ckpt: damaged, or not a checkpoint of NormOCC",
    ),
    "damaged configuration": (halve("checkpoints/config.json"), "config.json: damaged"),
    "damaged maps": (halve("maps.npz"), "maps.npz: not readable .*; leave quantile= or data.root= out"),
    "no maps": (drop("maps.npz"), "maps.npz: not readable .*; leave quantile= or data.root= out"),
}


@pytest.mark.parametrize("case", RUNS)
def test_spoilt_runs(case, run, photographs, tmp_path):
    spoil, pattern = RUNS[case]
    spoil(run)
    more = ["quantile=0.9"] if "maps" in case else []
    outcome = predict(f"run={run}", f"input={photographs}", f"output={tmp_path / 'out'}", *more)
    assert_refused(outcome, pattern)
    assert not (tmp_path / "out").exists()


def test_input_without_images(trained, tmp_path):
    (tmp_path / "in").mkdir()
    arguments = [f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]
    assert_refused(predict(*arguments), r"input=.*/in: holds no image \(.*\.png")
    (tmp_path / "in" / "notes.txt").write_text("text")
    assert_refused(predict(*arguments), r"input=.*/in: holds no image")
    assert not (tmp_path / "out").exists()


def test_output_that_cant_be_written(trained, photographs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        outcome = predict(f"run={trained}", f"input={photographs}", f"output={output}")
        assert_refused(outcome, f"{tmp_path / 'file'}.*output=DIR")
    assert (tmp_path / "file").read_text() == "mine"
    if sys.platform.startswith("linux"):
        outcome = predict(f"run={trained}", f"input={photographs}", "output=/proc/anomalib_lite")
        assert_refused(outcome, "/proc/anomalib_lite: .*output=DIR")


def test_output_that_holds_scores(trained, photographs, tmp_path):
    predicted(trained, photographs / "wide.jpg", tmp_path)
    before = (tmp_path / "scores.csv").read_bytes()
    arguments = [f"input={photographs}", f"run={trained}"]
    assert_refused(predict(*arguments, f"output={tmp_path}"), "scores.csv exists already: choose another output=DIR")
    assert (tmp_path / "scores.csv").read_bytes() == before
    assert_refused(predict(*arguments, f"output={trained}"), "scores.csv exists already")  # the run's own


# --- as processes of their own ---


@pytest.mark.parametrize("program", ["predict", "evaluate"])
def test_help_comes_at_once(program):
    code = (
        f"import sys; sys.argv = ['x', '--help']; from anomalib_lite.{program} import main; main(); "
        "print('loaded', {'torch', 'lightning', 'cv2', 'hydra'} & set(sys.modules))"
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = python("-c", code)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 1  # of the processor: the machine may be busy
    assert outcome.code == 0, outcome.err
    assert f"python -m anomalib_lite.{program} run=DIR" in outcome.out
    assert ("overlays/a.jpg.png for a.jpg" in outcome.out) == (program == "predict")
    assert "loaded set()" in outcome.out
