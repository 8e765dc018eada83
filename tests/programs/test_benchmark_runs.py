"""Runs on benchmarks: data.check=only for each, a whole run on MVTec LOCO with its sPRO, and another test set."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.data.benchmarks import read_mvtec_loco
from anomalib_lite.runs.load import load_run
from tests.helpers import benchmark_trees as trees
from tests.helpers import run_programs as runs
from tests.helpers.slow_spro import slow_spro

COUNTS = {
    "mvtec_ad_2": ("can: 4 training images, 4 test images", "  test bad: 2 images, 2 masks"),
    "mvtec_loco": ("screw_bag: 4 training images, 5 test images", "  test logical_anomalies: 2 images, 2 masks"),
    "real_iad": ("audiojack: 4 training images, 6 test images", "  test AK: 2 images, 2 masks"),
    "btad": ("01: 4 training images, 4 test images", "  test ko: 2 images, 2 masks"),
    "mpdd": ("tubes: 4 training images, 4 test images", "  test parts_mismatch: 2 images, 2 masks"),
    "kolektor_sdd": ("kolektor_sdd: 8 training images, 4 test images", "  test defect: 2 images, 2 masks"),
    "kolektor_sdd2": ("kolektor_sdd2: 4 training images, 4 test images", "  test defect: 1 images, 1 masks"),
}


@pytest.mark.parametrize("name", trees.MAKERS)
def test_check_only(name, tmp_path):
    root = trees.MAKERS[name](tmp_path / "data")
    category = COUNTS[name][0].partition(":")[0]
    place = (f"data={name}", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}")
    outcome = runs.succeeded(runs.train(*place, f"data.category={category}", "data.check=only"))
    lines = outcome.out.splitlines()
    assert lines[0] == f"{name} in {root}"
    assert set(COUNTS[name]) <= set(lines)
    assert (tmp_path / "run" / "data.png").is_file()
    outcome = runs.train(f"data={name}", f"data.root={tmp_path}", f"hydra.run.dir={tmp_path / 'no'}")
    assert outcome.code == 2
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def loco(tmp_path_factory):
    """A unified run on two categories, and its data."""
    folder = tmp_path_factory.mktemp("loco")
    root = trees.make_loco(folder / "data")
    place = ("data=mvtec_loco", f"data.root={root}", "data.category=all", "method=norm_occ_closed_form")
    return root, folder / "run", runs.result_of(*place, "split=shots", "split.shots=3", run_dir=folder / "run")


def test_spro_of_loco(loco):
    """Against the literal sPRO of the maps that the run predicts, from the masks' files and the JSON's thresholds."""
    root, run, result = loco
    limits = {"spro_30": 0.3, "spro_05": 0.05}
    for category, metrics in result["per_category"].items():
        samples = read_mvtec_loco(root, category).test
        images = [np.array(Image.open(sample.path)) for sample in samples]
        _, maps = load_run(run, category).predict(images)
        regions: list[list[tuple[np.ndarray, float]]] = []
        for sample in samples:
            regions.append([])
            for file in sorted(sample.mask.iterdir()) if sample.mask else ():
                values = np.array(Image.open(file))
                threshold, relative = trees.DEFECTS[int(values.max())]
                area = int((values > 0).sum())
                regions[-1].append((values > 0, int(threshold * area) if relative else min(threshold, area)))
        for kind in ("logical_anomalies", "structural_anomalies"):
            rows = [i for i, sample in enumerate(samples) if sample.defect in ("good", kind)]
            for key, limit in limits.items():
                expected = slow_spro([maps[i] for i in rows], [regions[i] for i in rows], limit)
                assert result["per_defect"][category][kind][key] == pytest.approx(expected, abs=1e-6)
        for key in limits:
            kinds = [of_kind[key] for of_kind in result["per_defect"][category].values()]
            assert metrics[key] == pytest.approx(np.mean(kinds))
    for key in limits:
        assert result["metrics"][key] == pytest.approx(np.mean([m[key] for m in result["per_category"].values()]))
    assert not any("sPRO" in note or "saturation" in note for note in result["notes"])


def test_loco_elsewhere_and_resized(loco, tmp_path):
    """Moved data are the same; at other sizes of the maps a defect keeps the share that suffices; other test images."""
    root, run, result = loco
    moved = shutil.copytree(root, tmp_path / "moved")
    again = (f"run={run}", f"output={tmp_path / 'again'}", f"data.root={moved}")
    outcome = runs.succeeded(runs.evaluate(*again, "scoring.map_size=16", "scoring.fpr_limits=[0.1]"))
    assert "sPRO" in outcome.out
    small = json.loads((tmp_path / "again" / "result.json").read_text())
    assert "test_set" not in small
    assert 0 <= small["metrics"]["spro_10"] <= 1

    for category in ("pushpins", "screw_bag"):
        shutil.rmtree(moved / category / "train")
    (moved / "pushpins" / "test" / "good" / "001.png").unlink()
    trees.save_square(moved / "pushpins" / "ground_truth" / "structural_anomalies" / "000" / "001.png", 20, 3, 9)
    runs.succeeded(runs.evaluate(f"run={run}", f"output={tmp_path / 'other'}", f"data.root={moved}"))
    other = json.loads((tmp_path / "other" / "result.json").read_text())
    assert other["thresholds"] == result["thresholds"]
    assert other["data"]["test_counts"]["pushpins"] == {"good": 1, "defective": 3}
    assert other["per_category"]["screw_bag"] == pytest.approx(result["per_category"]["screw_bag"], abs=1e-6)
    assert any("pushpins: masks of value 9 have no saturation threshold" in note for note in other["notes"])
