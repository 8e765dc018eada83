"""Pictures of 4000 × 3000 pixels in tiles: the peak memory of training, test and prediction."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers import run_programs as runs

pytestmark = pytest.mark.slow
GIB = 2**30
#: runs a program and prints its peak memory in bytes
MEASURED = """
import sys
from importlib import import_module
program = sys.argv.pop(1)
import_module(f"anomalib_lite.{program}").main()
from anomalib_lite.runs.devices import peak_resident
print("peak", peak_resident())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two training images, a good and a defective test image with its mask: clouds with a dark line."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("train/good/0", "train/good/1", "test/good/0", "test/scratch/0"):
        image = cv2.resize(rng.integers(60, 200, (30, 40, 3), np.uint8), (4000, 3000), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros((3000, 4000), np.uint8)
        cv2.line(mask, (1000, 900), (1500, 1300), 255, 12)
        file = root / "part" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if "scratch" in name:
            image[mask > 0] = 10
            (root / "part/ground_truth/scratch").mkdir(parents=True)
            cv2.imwrite(str(root / "part/ground_truth/scratch/0_mask.png"), mask)
        cv2.imwrite(str(file), image)
    return root


def peak(program: str, *arguments: str | Path) -> float:
    """GiB."""
    outcome = runs.succeeded(runs.python("-c", MEASURED, program, *arguments, timeout=1500))
    return int(outcome.out.rpartition("peak ")[2]) / GIB


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("norm_occ", ["trainer.max_epochs=1"]),
        ("patchcore", ["backbone.layers=[3]", "method.coreset=0.001", "scoring.map_size=[750,1000]"]),
        ("ssae", ["method.width=16", "method.patience=null", "trainer.max_epochs=1"]),
    ],
)
def test_peak_memory(method, options, root, tmp_path, capsys):
    run = tmp_path / "run"
    common = [
        "backbone=resnet18", "backbone.weights=none", "data.tiling={size: 512, overlap: 64}", "data.eval_batch_size=8",
        "data.batch_size=2", "hardware=cpu", "hardware.measure_cost=false", "logger=csv",
    ]  # fmt: skip
    found = {"train": peak("train", *runs.folder_data(root, "part"), f"method={method}", *common, *options,
                           f"hydra.run.dir={run}")}  # fmt: skip
    found["predict"] = peak(
        "predict", f"run={run}", f"input={root / 'part' / 'test' / 'scratch'}", f"output={tmp_path / 'out'}"
    )
    result = json.loads((run / "result.json").read_text())
    with capsys.disabled():
        print(f"\n{method}: " + ", ".join(f"{program} {gib:.2f} GiB" for program, gib in found.items()))
    assert max(found.values()) < 2
    assert not [note for note in result["notes"] if "left out" in note]
    assert (run / "figures" / "part.png").exists()
