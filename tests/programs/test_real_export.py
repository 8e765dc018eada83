"""Exported files of bottle with a resnet18: the table of experiments/export.md (`-s` prints it)."""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import real_images as real
from tests.helpers import run_programs as runs

pytestmark = [pytest.mark.real, pytest.mark.slow]
#: tiny budgets: the table is about files, not about metrics
METHODS = {
    "norm_occ": (), "norm_occ_closed_form": (), "patchcore": (),
    "ssae": ("method.width=32", "method.patience=null"),
    "recontrast": ("backbone.layers=[1,2,3]",),
    "rlr": ("backbone.layers=[2,3]",),
    "ltad": ("backbone.layers=[1,2,3]", "data.image_size=256"),
}  # fmt: skip
PRECISIONS = ("float32", "float16", "int8")
IMAGES, REPEATS = 20, 11


def in_turn(*scorers, repeats: int) -> list[tuple[float, float]]:
    """Of each scorer the medians of its wall time and of its processor time in ms. They take turns in one process: what
    else the machine computes slows all of them.
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in scorers]
    for _ in range(repeats + 1):
        for scorer, times in zip(scorers, taken, strict=True):
            start = time.perf_counter(), time.process_time()
            scorer()
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [tuple(1000 * statistics.median(each) for each in zip(*times[1:], strict=True)) for times in taken]


@pytest.mark.parametrize("method", METHODS)
def test_table(method, tmp_path):
    pytest.importorskip("onnxscript")
    from anomalib_lite.export import main
    from anomalib_lite.exporting import files
    from anomalib_lite.exporting.export import NORMAL_IMAGES, largest_difference
    from anomalib_lite.runs.load import load_run

    weights = real.weights() / "resnet18_imagenet1k_layers1-3.safetensors"
    data = ["data=mvtec", f"data.root={real.parts()}", "data.category=bottle"]
    budget = ["trainer.max_epochs=null", "trainer.max_steps=10", "split=shots", f"split.shots={NORMAL_IMAGES}"]
    budget = budget if method in ("ssae", "recontrast", "rlr", "ltad") else []
    done = runs.train(
        f"method={method}", *data, "backbone=resnet18", f"backbone.weights={weights}", "hardware=cpu", "logger=csv",
        "hardware.measure_cost=false", *budget, *METHODS[method], f"hydra.run.dir={tmp_path / 'run'}", small=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    loaded = load_run(tmp_path / "run", device="cpu")
    files_of = sorted((real.parts() / "bottle" / "test").rglob("*.png"))
    paths = [files_of[i] for i in np.linspace(0, len(files_of) - 1, IMAGES).astype(int)]
    images = [loaded._pipeline.load(path) for path in paths]
    expected = loaded.predict(images)[0].astype(float)
    scorers = {}
    for precision in PRECISIONS:
        file: Path = tmp_path / f"{precision}.onnx"
        outcome = runs.run(main, f"run={tmp_path / 'run'}", f"output={file}", f"precision={precision}", "force=true")
        if outcome.code:  # an operation that has no 8-bit form
            print(f"\n{method} {precision}: {outcome.err}")
            assert precision == "int8"
            continue
        scorers[precision] = scorer = files.opened(file)  # with as many threads as torch
        difference = largest_difference(files.scores_of(scorer, images), expected)
        print(f"\n| {method} | {precision} | {difference:.1e} | {file.stat().st_size / 1e6:.1f} |")
        print("\n".join(line for line in outcome.out.splitlines() if "move by" in line or "AUROC" in line))
        assert precision != "float32" or difference < 1e-4
    calls = [lambda scorer=scorer: scorer(images[0][None]) for scorer in scorers.values()]
    (wall, cpu), *theirs = in_turn(lambda: loaded.predict(images[:1]), *calls, repeats=REPEATS)
    print(f"\n{method}: predict {wall:.0f} ms an image, {cpu:.0f} ms of processor time")
    for precision, (own_wall, own_cpu) in zip(scorers, theirs, strict=True):
        print(f"{method} {precision}: {own_wall / wall:.2f} of predict's time, {own_cpu / cpu:.2f} of processor time")
