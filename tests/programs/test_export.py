"""Exported files: scores as predict's, Pillow's resizing, the runner alone, metadata, precision, and bad input."""

import ast
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError
from anomalib_lite.methods.ssae import SSAE
from anomalib_lite.runs.load import load_run
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

pytest.importorskip("onnxscript")
onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
from anomalib_lite.exporting import export as exporting  # noqa: E402
from anomalib_lite.exporting import files, resize  # noqa: E402
from anomalib_lite.exporting.export import chosen_categories, threshold_notes  # noqa: E402

FILTERS = ("nearest", *resize.FILTERS)
SIZES = ((64, 64), (37, 53), (200, 90), (66, 60))
METHODS = sorted(path.stem for path in (runs.ROOT / "conf" / "method").glob("*.yaml"))
COMPARED = "the file's scores differ from predict's in float32 (precision=32) by at most "
OPTIONS = {
    "padim": ("method.dim=16",),
    "rlr": ("method.windows=[3,3,1]",),
    "norm_occ": ("data.resample=lanczos", "scoring.image_score=0.01"),
    "patchcore": ("backbone=resnet18", "data.resample=nearest"),  # weights that int8 makes smaller
}


def export(*arguments: str | Path) -> runs.Outcome:
    """`python -m anomalib_lite.export ARGUMENTS`."""
    from anomalib_lite.export import main

    return runs.run(main, *arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=6, good=3, defects={"broken": 3}, size=48)
    make_mvtec(root, "wood", train=4, good=2, defects={"scratch": 2}, size=48)
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """(method, category) -> the folder of a run."""

    @cache
    def get(method: str, category: str = "bottle", *options: str) -> Path:
        run = tmp_path_factory.mktemp(method) / "run"
        # in float32, as the files: a machine's own precision may be bf16
        chosen = [
            *runs.method(method),
            *OPTIONS.get(method, ()),
            "data.image_size=64",
            "hardware.precision=32",
            *options,
        ]
        runs.result_of(*chosen, *runs.folder_data(root, category), run_dir=run)
        return run

    return get


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(method, suffix, category) -> the exported file of a run."""

    @cache
    def get(method: str, suffix: str = ".onnx", category: str = "bottle") -> Path:
        file = tmp_path_factory.mktemp("exported") / f"{method}{suffix}"
        outcome = runs.succeeded(export(f"run={trained(method, category)}", f"output={file}"))
        assert COMPARED in outcome.out
        assert "note: " not in outcome.out
        return file

    return get


def pictures(*sizes: tuple[int, int], count: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (count, *size, 3), np.uint8) for size in sizes]


def assert_scores_as_predict(file: Path, run: Path, category: str | None = None) -> None:
    """Scores and maps of single images and of batches of three, at several sizes."""
    scorer, loaded = files.opened(file), load_run(run, category, device="cpu")
    for images in [*pictures(*SIZES), *pictures(SIZES[1], count=3)]:
        scores, maps = scorer(images)
        expected, expected_maps = loaded.predict(list(images))
        assert scores == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(maps, np.stack(expected_maps), rtol=1e-3, atol=1e-4 * np.abs(expected_maps).max())


def test_scores_of_a_model_of_two_categories(exported, trained):
    assert_scores_as_predict(
        exported("norm_occ", category="[bottle,wood]"), trained("norm_occ", "[bottle,wood]"), "wood"
    )


def test_scores_of_patchcore(exported, trained):
    assert_scores_as_predict(exported("patchcore"), trained("patchcore"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_every_method(method, suffix, exported, trained):
    assert_scores_as_predict(exported(method, suffix), trained(method))


# --- resizing ---


def pil(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling[resample.upper()]))


@pytest.mark.parametrize("resample", FILTERS)
def test_resizing_equals_pillow(resample):
    """Up, down, both, to the same size, and by much."""
    for size in ((64, 48), (17, 33)):
        for given in ((64, 48), (37, 53), (300, 200), (65, 47), (1, 1), (7, 90), (500, 48)):
            (images,) = pictures(given, count=2)
            found = resize.resized(torch.from_numpy(images), size, resample).numpy()
            assert (found == np.stack([pil(image, size, resample) for image in images])).all()


def test_resizing_in_onnx_equals_pillow(exported, tmp_path):
    """In an exported file, which chooses the axis that is resized first."""
    model = onnx.load(exported("norm_occ", category="[bottle,wood]"))
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    model.graph.output.insert(0, onnx.ValueInfoProto(name=choice.output[0]))
    onnx.save(model, tmp_path / "more.onnx")
    session = ort.InferenceSession(str(tmp_path / "more.onnx"))
    for given in ((64, 64), (37, 53), (200, 90), (65, 63), (1, 1), (7, 190), (190, 60), (700, 500)):
        (images,) = pictures(given, count=2)
        found = session.run(None, {"images": images})[0]
        expected = np.stack([pil(image, (64, 64), "lanczos") for image in images])
        assert np.abs(found.astype(int) - expected).max() <= 1  # onnxruntime's sine may differ in its last bit
        assert (found != expected).mean() < 1e-3


# --- the runner ---


def turned(path: Path) -> Path:
    """A photo whose EXIF tag says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures((50, 70))[0][0]).save(path, exif=exif, quality=95)
    return path


def test_the_runner_alone_gives_the_scores_of_predict(exported, trained, root, tmp_path):
    """In a process that takes nothing from its surroundings, and imports nothing but its three packages."""
    file, run = exported("norm_occ", category="[bottle,wood]"), trained("norm_occ", "[bottle,wood]")
    photos = [turned(tmp_path / "turned.jpg"), root / "wood/test/good/000.png"]
    Image.fromarray(pictures((40, 60))[0][0, ..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(pictures((40, 60))[0][0, ..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "cut.ppm").write_bytes(b"P6 4")
    photos += [tmp_path / "gray.png", tmp_path / "cut.ppm", tmp_path / "deep.png"]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-I", "-c", code, file.with_suffix(".py"), "category=wood", *photos]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert f"left out: {tmp_path / 'cut.ppm'}: " in done.stderr
    assert "deep.png: more than 8 bits per channel; convert it to 8 bits, as predict does by itself\n" in done.stderr
    loaded = set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))
    assert loaded & {"torch", "cv2", "anomalib_lite", "onnx", "scipy", "timm"} == set()
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert runs.predict(f"run={run}", f"input=[{','.join(map(str, photos[:3]))}]", f"output={tmp_path / 'out'}",
                        "category=wood").code == 0  # fmt: skip
    expected = {Path(row["path"]).name: row for row in runs.rows_of(tmp_path / "out" / "scores.csv")}
    assert [Path(row["path"]).name for row in rows] == ["turned.jpg", "000.png", "gray.png"]
    for row in rows:
        other = expected[Path(row["path"]).name]
        assert float(row["score"]) == pytest.approx(float(other["score"]), rel=1e-4)
        assert (row["threshold"], row["decision"]) == (other["threshold"], other["decision"])


def test_the_runner_needs_a_category_where_there_are_several(exported):
    done = runs.python("-I", exported("norm_occ", category="[bottle,wood]").with_suffix(".py"), "photo.png")
    assert (done.code, done.err) == (2, "error: category=NAME: give one of bottle, wood\n")


def test_the_runner_explains_itself(exported, root, tmp_path):
    """--help, no arguments, and mistakes: exit code 2 and no header of a table. A file may be called like an option."""
    runner = exported("patchcore").with_suffix(".py")
    usage = "Score images with the model beside this file.\n\n    python patchcore.py [category=NAME] IMAGE...\n"
    for flag in ("--help", "-h"):
        done = runs.python("-I", runner, "photo.png", flag)
        assert (done.code, done.err, done.out[: len(usage)]) == (0, "", usage)
    done = runs.python("-I", runner)
    assert (done.code, done.out, done.err[: len(usage)]) == (2, "", usage)
    mistakes = {
        "--category": "--category: no such option, and no such file; see --help",
        "threshold=0.5": "threshold=0.5: no such option, and no such file; see --help",
        "category=bottle": "IMAGE: no image is given; see --help",
        "category=tile": "category=NAME: give one of bottle",
    }
    for argument, line in mistakes.items():
        done = runs.python("-I", runner, argument)
        assert (done.code, done.out, done.err) == (2, "", f"error: {line}\n")
    for name in ("a=b.png", "-c.png"):
        shutil.copy(root / "bottle/test/good/000.png", tmp_path / name)
    done = runs.python("-I", runner, "a=b.png", "-c.png", cwd=tmp_path)
    assert (done.code, done.err, len(done.out.splitlines())) == (0, "", 3)


def test_the_runner_imports_three_packages():
    tree = ast.parse((runs.ROOT / "anomalib_lite/exporting/runner.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


@pytest.mark.slow
def test_the_runner_in_a_fresh_environment(exported, root, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime", "pillow"]
    if subprocess.run(install, check=False, timeout=500).returncode:
        pytest.skip("no package index")
    photos = [root / "bottle/test/good/000.png", root / "bottle/test/broken/000.png"]
    command = [python, "-I", exported("patchcore").with_suffix(".py"), *photos]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


# --- metadata and precision ---


def test_metadata(exported, trained):
    file, run = exported("norm_occ", category="[bottle,wood]"), trained("norm_occ", "[bottle,wood]")
    found = ort.InferenceSession(str(file)).get_modelmeta().custom_metadata_map
    about = {key: json.loads(text) for key, text in found.items()}
    result = json.loads((run / "result.json").read_text())
    assert about["thresholds"] == result["thresholds"]["per_category"]
    assert about["categories"] == ["bottle", "wood"]
    assert about["method"] == "norm_occ"
    assert about["version"] == result["environment"]["anomalib_lite"]
    protocol = about["protocol"]
    assert (protocol["image_size"], protocol["resample"], protocol["map_size"]) == ([64, 64], "lanczos", [64, 64])
    assert protocol["normalize"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert protocol["scoring"] == {"pixel_smooth": 4, "image_smooth": "same", "image_score": 0.01}


PRECISION = "in another precision (bf16) than the file's float32, "


def test_thresholds_of_another_precision_are_noted(root, tmp_path):
    """One note for a run that was tested in bf16, and a comparison that says with what; none for runs in float32."""
    run = tmp_path / "run"
    chosen = ["method=norm_occ_closed_form", "data.resample=nearest", "hardware.precision=bf16"]
    runs.result_of(*chosen, *runs.folder_data(root), run_dir=run)
    outcome = export(f"run={run}", f"output={tmp_path / 'model.pt2'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("note: ") == outcome.out.count(PRECISION) == 1
    assert COMPARED in outcome.out
    (note,) = threshold_notes("bf16, TF32 in training")
    assert PRECISION in note
    assert note.endswith("train again with hardware.precision=32 and export that run")
    assert threshold_notes("float32, TF32 in training") == threshold_notes(None) == []


def test_int8_is_near_and_smaller(exported, tmp_path):
    source, file = exported("patchcore"), tmp_path / "int8.onnx"
    files.write_int8(source, file, pictures((48, 48), (64, 64), (48, 48)))
    assert file.stat().st_size < 0.6 * source.stat().st_size  # the bank's rows stay beside its product's weights
    images = [image[0] for image in pictures(*SIZES)]
    found, expected = (files.scores_of(files.opened(each), images) for each in (file, source))
    assert 0 < exporting.largest_difference(found, expected) < 0.3  # of a random network
    meta = [ort.InferenceSession(str(each)).get_modelmeta().custom_metadata_map for each in (file, source)]
    assert meta[0] == meta[1]


def test_defective_training_images_calibrate_no_file(monkeypatch):
    samples = [Sample(Path(f"{i}.png"), "bottle", "good", int(i == 1), None) for i in range(3)]
    monkeypatch.setattr(exporting.build, "make_data", lambda *given: SimpleNamespace(train_samples=samples))
    monkeypatch.setattr(exporting, "check_fingerprint", lambda *given: None)
    found, _ = exporting.normal_samples({}, {}, Path(), ["bottle"], "int8")
    assert [sample.path.stem for sample in found] == ["0", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "precision"), [(".onnx", "float16"), (".onnx", "int8"), (".pt2", "float16")])
def test_precision(suffix, precision, trained, tmp_path, monkeypatch):
    file, given = tmp_path / f"model{suffix}", [f"run={trained('norm_occ_closed_form')}", f"precision={precision}"]
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    outcome = export(*given, f"output={file}")
    assert outcome.code == 2
    assert re.fullmatch(rf"error: precision={precision}: the scores of 6 .* force=true .*\n", outcome.err)
    assert list(tmp_path.iterdir()) == []
    outcome = runs.succeeded(export(*given, f"output={file}", "force=true"))
    assert re.search(r"image AUROC on 6 test images: \d\.\d{4} before, \d\.\d{4} after", outcome.out)
    assert file.stat().st_size < 9e6  # 12 MB in float32


def test_scores_that_move_too_far_are_refused():
    with pytest.raises(Exception, match=r"^precision=int8: .* move by at most 0.5, which is 25 % \(0.1 is allowed\)"):
        exporting.check_moved(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.1, "int8", force=False)
    exporting.check_moved(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.1, "int8", force=True)
    with pytest.raises(Exception, match="nan"):
        exporting.check_moved(np.array([np.nan]), np.array([1.0]), 0.1, "int8", force=False)


# --- what can't be exported ---


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "run= is not set: give run=DIR output=FILE.onnx; see --help"),
    (("run=RUN",), "output= is not set: give run=DIR output=FILE.onnx; see --help"),
    (("run=none", "output=a.onnx"), "run=none: no such folder"),
    (("run=RUN", "output=a.zip"), "output=a.zip: give a file that ends in .onnx or .pt2"),
    (("run=RUN", "output=a.onnx", "precision=half"), "precision=half: choose float32, float16, int8"),
    (("run=RUN", "output=a.pt2", "precision=int8"), "precision=int8: only ONNX files have it; give output=FILE.onnx"),
    (("run=RUN", "output=a.onnx", "category=tile"), "category=tile: this run's categories are bottle"),
    (("run=RUN", "output=a.onnx", "quantile=1"), "quantile: no such option; see --help"),
    (("run=RUN", "output=there.onnx"), "output=there.onnx: there.py exists already; choose another name, or remove it"),
    (("run=RUN", "output=csv.onnx"), "output=csv.onnx: its runner csv.py would hide a module of this name; choose "
                                     "another name"),
])  # fmt: skip
def test_bad_input(arguments, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").touch()
    run = str(trained("patchcore"))
    outcome = export(*(argument.replace("RUN", run) for argument in arguments))
    assert (outcome.code, outcome.err) == (2, f"error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["there.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_folder_that_takes_no_file(trained):
    outcome = export(f"run={trained('patchcore')}", "output=/proc/a.onnx")
    assert outcome.code == 2
    assert re.fullmatch(r"error: /proc: .*; choose another output=DIR\n", outcome.err)


def test_missing_packages(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = export(f"run={trained('patchcore')}", f"output={tmp_path / 'a.onnx'}")
    assert outcome.code == 2
    assert re.fullmatch(
        r"error: output: onnx is not installed; pip install 'anomalib-lite\[export\]', .*\n", outcome.err
    )


def test_another_transform(trained, tmp_path):
    crop = "data.transform=[{_target_: albumentations.CenterCrop, height: 32, width: 32}]"
    run = trained("norm_occ_closed_form", "bottle", crop, "data.image_size=32")
    outcome = export(f"run={run}", f"output={tmp_path / 'a.onnx'}")
    assert outcome.err.startswith("error: data.transform: a file can hold one resizing and not CenterCrop; ")
    assert outcome.code == 2


@pytest.mark.parametrize(("calibrate", "chosen"), [(True, None), (False, ["bottle", "wood"])])
def test_a_category_is_required_where_the_scores_depend_on_it(calibrate, chosen):
    model = SSAE(width=4, image_size=(32, 32), calibrate=calibrate, categories=["bottle", "wood"])
    pipeline = SimpleNamespace(steps=[], mean=torch.zeros(1), std=torch.ones(1))
    data: Any = SimpleNamespace(eval_pipeline=pipeline, test_size="original")
    assert chosen_categories(model, data, "wood", "ssae") == ["wood"]
    if chosen is None:
        with pytest.raises(UserError, match=r"^category= is not set: ssae's scores .*; give one of bottle, wood$"):
            chosen_categories(model, data, None, "ssae")
    else:
        assert chosen_categories(model, data, None, "ssae") == chosen


def test_ltad_needs_a_category(trained, tmp_path):
    run = trained("ltad", "[bottle,wood]")
    outcome = export(f"run={run}", f"output={tmp_path / 'a.onnx'}")
    assert outcome.code == 2
    assert "category= is not set: ltad's scores depend on the category; give one of bottle, wood" in outcome.err
