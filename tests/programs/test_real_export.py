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
IMAGES, REPEATS = 20, 3


def milliseconds(run) -> float:
    """The median time of some runs after one to warm up."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


@pytest.mark.parametrize("method", METHODS)
def test_table(method, tmp_path):
    pytest.importorskip("onnxscript")
    from anomalib_lite.export import main
    from anomalib_lite.exporting import checks, files
    from anomalib_lite.runs.load import load_run

    weights = real.weights() / "resnet18_imagenet1k_layers1-3.safetensors"
    data = ["data=mvtec", f"data.root={real.parts()}", "data.category=bottle"]
    budget = (
        ["trainer.max_epochs=null", "trainer.max_steps=10"] if method in ("ssae", "recontrast", "rlr", "ltad") else []
    )
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
    for precision in PRECISIONS:
        file: Path = tmp_path / f"{precision}.onnx"
        outcome = runs.run(main, f"run={tmp_path / 'run'}", f"output={file}", f"precision={precision}", "force=true")
        assert outcome.code == 0, outcome.err
        scorer = files.opened(file)
        difference = checks.largest_difference(files.scores_of(scorer, images), expected)
        ours = milliseconds(lambda: loaded.predict(images[:1]))
        theirs = milliseconds(lambda scorer=scorer: scorer(images[0][None]))
        size = file.stat().st_size / 1e6
        print(f"\n| {method} | {precision} | {difference:.1e} | {size:.1f} | {theirs:.0f} | {ours:.0f} |")
        print("\n".join(line for line in outcome.out.splitlines() if "move by" in line or "AUROC" in line))
        if precision == "float32":
            assert difference < 1e-4
