"""A stored run evaluated again under another protocol: limits, scores, the maps' size, original sizes, ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomalib_lite.comparison import find_runs
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_mvtec
from anomalib_lite.metrics.functional import image_metrics, pixel_metrics
from anomalib_lite.metrics.overlap import overlap_metrics
from anomalib_lite.runs.folder import read_run, stored_config
from tests.helpers import run_programs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import build, evaluate, folder_data, predict, restored, result_of, train

SIGMA = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """bottle: pictures of two sizes, 40×56 (H×W) and 90×70, each with a mask whose component is its own."""
    root = tmp_path_factory.mktemp("data")
    folder = make_mvtec(root, "bottle", train=6, good=3, defects={"broken": 3, "bent": 2})
    rng = np.random.default_rng(0)
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        # a mask's size is its image's: both follow from the folder and the number
        height, width = (40, 56) if int(file.stem[:3]) % 2 else (90, 70)
        if "ground_truth" in file.parts:
            mask = np.zeros((height, width), np.uint8)
            mask[i : i + 13, 5:18] = 1
            mask[30:33, 20:50] = 200
            Image.fromarray(mask).save(file)
        else:
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    result_of(*folder_data(root), "data.image_size=48", f"scoring.pixel_smooth={SIGMA}", run_dir=run)
    return run


def evaluated(run: Path, output: Path, *options: str) -> dict[str, Any]:
    """An evaluation that must succeed; its result."""
    outcome = evaluate(f"run={run}", f"output={output}", *options)
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads((output / "result.json").read_text())


def scores_of(run: Path) -> list[float]:
    return list(run_programs.scores_of(run).values())


def raw_maps(run: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The DataModule of a run, and the method's own maps of the test and training images by path."""
    checkpoint, cfg, _ = read_run(run)
    with restored(), torch.no_grad():
        data, model = build(cfg)
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        model.eval()
        maps: dict[str, np.ndarray] = {}
        for loader in (data.test_dataloader(), data.train_eval_dataloader()):
            for batch in loader:
                found = model.anomaly_map(batch)
                assert isinstance(found, torch.Tensor)
                maps |= dict(zip(batch["path"], found.numpy(), strict=True))
    return data, maps


def literally(run: Path, size_of: Any) -> dict[str, Any]:
    """Metrics, scores and thresholds with every map brought to `size_of(image)`, smoothed there, beside its mask."""
    data, raw = raw_maps(run)

    def smoothed(path: Path) -> np.ndarray:
        size = size_of(Image.open(path))
        large = F.interpolate(torch.from_numpy(raw[str(path)])[None, None], size, mode="bilinear", align_corners=False)
        return gaussian_filter(large[0, 0].double().numpy(), SIGMA)

    maps, masks = [smoothed(sample.path) for sample in data.test_samples], []
    for sample in data.test_samples:
        height, width = size_of(Image.open(sample.path))
        mask = np.zeros((height, width), bool)
        if sample.mask:
            mask = np.asarray(Image.open(sample.mask).resize((width, height), Image.Resampling.NEAREST)) > 0
        masks.append(mask)
    scores = np.array([x.max() for x in maps])
    labels = np.array([sample.label for sample in data.test_samples])
    normal = [smoothed(sample.path).max() for sample in data.train_samples]
    threshold = float(np.quantile(normal, 0.99))
    metrics = image_metrics(scores, labels) | pixel_metrics(maps, masks) | overlap_metrics(maps, masks, threshold)
    return {"metrics": metrics, "scores": scores, "threshold": threshold}


def assert_equal(result: dict[str, Any], output: Path, expected: dict[str, Any]) -> None:
    assert result["metrics"].pop("aupimo") is None  # of tiny images
    assert result["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)  # float32 beside float64
    assert scores_of(output) == pytest.approx(expected["scores"], rel=1e-5)
    thresholds = result["thresholds"]["per_category"]["bottle"]
    assert thresholds["image"] == pytest.approx(expected["threshold"], rel=1e-5)
    assert thresholds["pixel"] == pytest.approx(expected["threshold"], rel=1e-5)


def test_limits_of_aupro(trained, tmp_path):
    outcome = evaluate(f"run={trained}", f"output={tmp_path / 'out'}", "scoring.fpr_limits=[0.1,0.3]")
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    first = json.loads((trained / "result.json").read_text())
    assert set(result["metrics"]) == (set(first["metrics"]) - {"aupro_05"}) | {"aupro_10"}
    assert result["metrics"]["aupro_30"] == first["metrics"]["aupro_30"]
    assert 0 < result["metrics"]["aupro_10"] < result["metrics"]["aupro_30"]
    assert {"aupro_10", "aupro_30"} < set(result["per_defect"]["bottle"]["bent"])
    assert result["protocol"]["data"] == first["protocol"]["data"] | {"fpr_limits": [0.1, 0.3]}
    assert "@0.1 " in outcome.out
    assert "@0.05" not in outcome.out


def test_thresholds_from_some_of_the_images(trained, tmp_path):
    """Drawn by the seed and recorded; with as many as there are, nothing changes."""
    first, all_scores = (
        json.loads((trained / "result.json").read_text()),
        np.load(trained / "maps.npz")["normal/scores"],
    )
    assert "drawn_from" not in first["thresholds"]
    assert evaluated(trained, tmp_path / "all", "scoring.threshold_images=6")["thresholds"] == first["thresholds"]
    some = evaluated(trained, tmp_path / "some", "scoring.threshold_images=3")
    scores = np.load(tmp_path / "some" / "maps.npz")["normal/scores"]
    assert len(scores) == 3
    assert all(np.isclose(all_scores, score, rtol=1e-5).any() for score in scores)
    assert some["thresholds"]["drawn_from"] == {"bottle": 6}
    assert some["thresholds"]["per_category"]["bottle"]["images"] == 3
    assert some["thresholds"]["per_category"]["bottle"]["image"] == pytest.approx(np.quantile(scores, 0.99))
    assert any(note.endswith("drawn by the seed: bottle (3 of 6)") for note in some["notes"])
    assert some["protocol"] == first["protocol"]


def test_image_score(trained, tmp_path):
    first = json.loads((trained / "result.json").read_text())
    for how in ("mean", 0.05):
        result = evaluated(trained, tmp_path / str(how), f"scoring.image_score={how}")
        assert result["protocol"]["scoring"] == first["protocol"]["scoring"] | {"image_score": how}
        assert result["metrics"]["pixel_auroc"] == first["metrics"]["pixel_auroc"]
        assert all(a < b for a, b in zip(scores_of(tmp_path / str(how)), scores_of(trained), strict=True))


def test_the_inputs_size_is_the_default(trained, tmp_path):
    first = json.loads((trained / "result.json").read_text())
    for i, size in enumerate(("null", "48", "[48,48]")):
        result = evaluated(trained, tmp_path / str(i), f"scoring.map_size={size}")
        for key in ("metrics", "per_defect", "thresholds", "protocol"):
            assert result[key] == first[key]
        assert scores_of(tmp_path / str(i)) == scores_of(trained)
    assert first["protocol"]["data"]["map_size"] == [48, 48]
    assert "map_size" not in first["protocol"]["scoring"]


@pytest.mark.parametrize(("option", "size"), [("80", (80, 80)), ("[30,44]", (30, 44))])
def test_another_size_of_the_maps(option, size, trained, tmp_path):
    result = evaluated(trained, tmp_path, f"scoring.map_size={option}")
    assert result["protocol"]["data"]["map_size"] == list(size)
    assert_equal(result, tmp_path, literally(trained, lambda image: size))


def test_original_sizes(trained, tmp_path):
    result = evaluated(trained, tmp_path / "out", "scoring.map_size=original", "data.eval_batch_size=5")
    assert result["protocol"]["data"]["map_size"] == "original"
    assert_equal(result, tmp_path / "out", literally(trained, lambda image: image.size[::-1]))
    assert np.load(tmp_path / "out" / "maps.npz")["maps"].shape == (8, 64, 64)
    assert (tmp_path / "out" / "figures" / "bottle.png").is_file()
    assert "bottle/pro" in np.load(tmp_path / "out" / "maps.npz").files


def test_trained_with_original_sizes(root, trained, tmp_path):
    """From the start, with validation, then used for prediction: the same scores everywhere."""
    again = evaluated(trained, tmp_path / "again", "scoring.map_size=original")
    common = [*folder_data(root), "data.image_size=48", f"scoring.pixel_smooth={SIGMA}", "scoring.map_size=original"]
    for memory in (8, 0):
        run = tmp_path / f"run {memory}"
        result = result_of(*common, f"hardware.feature_memory_gb={memory}", run_dir=run)
        for key in ("metrics", "thresholds"):
            assert result[key] == again[key]
        assert scores_of(run) == scores_of(tmp_path / "again")
    run_programs.succeeded(predict(f"run={run}", f"input={root / 'bottle' / 'test'}", f"output={tmp_path / 'out'}"))
    assert sorted(scores_of(tmp_path / "out")) == pytest.approx(sorted(scores_of(run)), rel=1e-6)
    held_out = result_of(*common, "data.val_fraction=0.5", run_dir=tmp_path / "held out")["validation"]
    assert all(0 <= value <= 1 for key, value in held_out.items() if key != "aupimo")


def test_original_sizes_without_test_images(root, tmp_path):
    shutil.copytree(root / "bottle" / "train", tmp_path / "data" / "bottle" / "train")
    result = result_of(*folder_data(tmp_path / "data"), "scoring.map_size=original", run_dir=tmp_path / "run")
    assert result["metrics"]["pixel_auroc"] is None
    assert result["thresholds"]["per_category"]["bottle"]["images"] == 6


@pytest.mark.parametrize("size", ["big", "3", "[48]", "[48,48,3]", "1.5", "true"])
def test_a_size_that_means_nothing(size, trained, tmp_path):
    outcome = evaluate(f"run={trained}", f"output={tmp_path / 'out'}", f"scoring.map_size={size}")
    run_programs.assert_refused(outcome, "^error: scoring.map_size=")
    assert not (tmp_path / "out").exists()


def test_a_transform_that_may_crop(root, tmp_path):
    transform = "data.transform=[{_target_: albumentations.CenterCrop, height: 32, width: 32}]"
    outcome = train(*folder_data(root), transform, "scoring.map_size=original", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "scoring.map_size=original: goes without data.transform" in outcome.err


def test_masks_of_a_transform_at_a_map_size(root, tmp_path):
    """What the crop leaves of a mask is resized, not the mask of the whole image; predict draws such a run's maps."""
    crop = "data.transform=[{_target_: albumentations.CenterCrop, height: 32, width: 32}]"
    result = result_of(*folder_data(root), crop, "scoring.map_size=16", run_dir=tmp_path / "run")
    assert result["protocol"]["data"]["map_size"] == [16, 16]
    data = AnomalyDataModule(read_mvtec, root, "bottle", image_size=32, transform=[A.CenterCrop(32, 32)], map_size=16)
    data.setup()
    dataset: Any = data.test_dataloader().dataset
    for item in (dataset[i] for i, sample in enumerate(data.test_samples) if sample.mask):
        shrunk = Image.fromarray(item["mask"].numpy().astype(np.uint8)).resize((16, 16), Image.Resampling.NEAREST)
        assert np.array_equal(item["gt_mask"].numpy(), np.array(shrunk) > 0)
    outcome = predict(f"run={tmp_path / 'run'}", f"input={root / 'bottle' / 'test'}", f"output={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err


def test_a_choice_of_hardware_and_numbers(trained, tmp_path):
    """hardware=cpu is a choice, as in training, and its options count after it; 1e-1 is the number 0.1. The result says
    what the choice has changed, so that compare sees another precision.
    """
    run = shutil.copytree(trained, tmp_path / "run")
    stored = json.loads(stored_config(run).read_text())
    stored["config"]["hardware"]["precision"] = 32
    stored_config(run).write_text(json.dumps(stored))
    options = ("hardware.threads=1", "hardware=cpu", "scoring.fpr_limits=[1e-1]")
    found = evaluated(run, tmp_path / "out", *options)
    assert find_runs.config_of(tmp_path / "out", found)["hardware"]["precision"] == "auto"
    assert found["protocol"]["data"]["fpr_limits"] == [0.1]
    assert (
        found["metrics"]["image_auroc"] == json.loads((trained / "result.json").read_text())["metrics"]["image_auroc"]
    )
    outcome = evaluate(f"run={trained}", f"output={tmp_path / 'none'}", "hardware=tpu")
    assert (outcome.code, outcome.out) == (2, "")
    assert "hardware=tpu: no such choice; choose from auto, cpu, ddp, gpu" in outcome.err
