"""What a method costs, metrics per kind of defect, and runs on data that have no test images."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_folder
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.metrics.functional import image_metrics, pixel_metrics
from anomalib_lite.metrics.per_category import measure_categories
from anomalib_lite.runs.efficiency import measure_cost, no_speed, sizes
from anomalib_lite.runs.folder import read_run
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import (
    build,
    evaluate,
    folder_data,
    predict,
    restored,
    result_of,
    rows_of,
    succeeded,
    train,
)
from tests.helpers.run_programs import method as choose

UNTESTED = ("untested", "[untested,new]", "[untested,bottle]")  # categories without test images, alone and not
TRIED = ("norm_occ", "patchcore", "ssae")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=5, good=4, defects={"broken": 3, "bent": 2})
    make_mvtec(root, "wood", train=5, good=3, defects={"bent": 2, "scratch": 1})
    make_mvtec(root, "goodless", train=5, good=0, defects={"scratch": 2, "hole": 1})
    make_mvtec(root, "maskless", train=5, good=2, defects={"scratch": 2}, masks=False)
    for name in ("untested", "new"):
        make_mvtec(root, name, train=5)
        shutil.rmtree(root / name / "test")
        shutil.rmtree(root / name / "ground_truth")
    return root


# --- cost ---


def efficiency(model: AnomalyModule, data: AnomalyDataModule, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    cost, speed = sizes(model), no_speed()
    measure_cost(model, data, batch, cost, speed)
    return cost, speed


class Plain(AnomalyModule):
    """Two convolutions, the first of them frozen, and a linear layer a pixel, on a grid of half the input's sides."""

    def __init__(self, **context: Any):
        super().__init__(**context)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1).requires_grad_(False)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.last = nn.Linear(6, 1)

    def anomaly_map(self, batch: dict[str, Any]) -> torch.Tensor:
        x = self.second(self.first(batch["image"]).relu())
        return self.last(x.movedim(1, -1))[..., 0]


@pytest.mark.parametrize(
    ("smoothing", "taps"), [(None, 0), ({"box": 3}, 3), ({"box": 5, "times": 2}, 10), (1.0, 9)], ids=str
)
def test_flops_counted_by_hand(smoothing, taps, root):
    """A multiply-add is 2; biases, ReLU and the map's enlargement count nothing; smoothing is a part of the score."""
    data = AnomalyDataModule(read_folder, root, "bottle", image_size=(32, 48))
    data.setup()
    model = Plain(scoring={"pixel_smooth": smoothing}, image_size=(32, 48)).eval()
    cost, speed = efficiency(model, data, 12)  # more than the 9 test images: the run has seen no larger batch
    grid = 16 * 24
    network = 2 * grid * (3 * 3 * 3 * 8 + 8 * 6 + 6)
    assert cost["flops_per_image"] == network + 2 * 2 * 32 * 48 * taps  # rows, then columns
    assert cost["parameters"] == (3 * 3 * 3 * 8 + 8) + 8 * 6 + (6 + 1)
    assert cost["trainable"] == 8 * 6 + (6 + 1)
    assert speed["batch_size"] == 9
    assert speed["latency_ms"] > 0
    assert speed["images_per_s"] > 0


def test_flops_of_a_backbone(root):
    """Those of its convolutions, counted from the shapes that pass through them."""
    data = AnomalyDataModule(read_folder, root, "bottle", image_size=64)
    data.setup()
    backbone = Backbone("resnet18.tv_in1k", [1, 2], "none", "32")

    class Sum(AnomalyModule):
        def anomaly_map(self, batch):
            return self.features(batch)[0].sum(1)

    model = Sum(backbone=backbone, image_size=(64, 64)).eval()
    flops = 0

    def count(module: nn.Conv2d, inputs: Any, output: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * output[0].numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    hooks = [m.register_forward_hook(count) for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    batch = next(iter(data.test_dataloader()))
    backbone(batch["image"])
    for hook in hooks:
        hook.remove()
    cost, _ = efficiency(model, data, 2)
    assert cost["flops_per_image"] == flops
    assert flops > 2 * 64 * 3 * 49 * 32 * 32  # the first convolution alone
    assert cost["trainable"] == 0


# --- per kind of defect ---


def columns_of(run: Path) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """The columns from which a run's metrics follow (computed anew), and which categories have masks."""
    checkpoint, cfg, _ = read_run(run)
    with restored(), torch.no_grad():
        data, model = build(cfg)
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        model.eval()
        batches = list(data.test_dataloader())
        scored = [model.score(batch) for batch in batches]
    columns = {
        "scores": torch.cat([x["score"] for x in scored]).double().numpy(),
        "labels": torch.cat([batch["label"] for batch in batches]).numpy(),
        "maps": torch.cat([x["map"] for x in scored]).numpy(),
        "masks": torch.cat([batch["mask"] for batch in batches]).numpy(),
        "categories": np.array([sample.category for sample in data.test_samples]),
        "defects": np.array([sample.defect for sample in data.test_samples]),
    }
    return columns, data.has_masks


@pytest.mark.parametrize("category", ["bottle", "[bottle,goodless,wood,maskless]"])
def test_metrics_per_kind_of_defect(category, root, tmp_path):
    """A kind's images beside the good ones of its category, whatever other categories have a kind of that name."""
    result = result_of(*folder_data(root, category), run_dir=tmp_path)
    columns, has_masks = columns_of(tmp_path)
    kinds = {
        "bottle": {"bent": 2, "broken": 3}, "wood": {"bent": 2, "scratch": 1}, "goodless": {"hole": 1, "scratch": 2},
        "maskless": {"scratch": 2},
    }  # fmt: skip
    assert list(result["per_defect"]) == result["categories"]
    for name in result["categories"]:
        found = result["per_defect"][name]
        assert {kind: found[kind]["images"] for kind in found} == kinds[name]
        for kind in found:
            rows = (columns["categories"] == name) & np.isin(columns["defects"], ["good", kind])
            expected = image_metrics(columns["scores"][rows], columns["labels"][rows])
            if has_masks[name]:
                expected |= pixel_metrics(columns["maps"][rows], columns["masks"][rows])
            assert {key: found[kind][key] for key in expected} == pytest.approx(expected, abs=1e-6)
            assert (found[kind]["image_auroc"] is None) == (name == "goodless")
            assert (found[kind]["pixel_auroc"] is None) == (name == "maskless")
            assert set(found[kind]) == {"images", *result["metrics"]}


def test_a_kind_is_compared_with_good_images_of_its_category_alone():
    columns = {
        "categories": np.array(["a", "a", "a", "b", "b"]), "defects": np.array(["good", "hole", "cut", "good", "hole"]),
        "scores": np.array([0.5, 0.7, 0.1, 0.9, 1.0]), "labels": np.array([0, 1, 1, 0, 1]),
    }  # fmt: skip
    found = measure_categories(columns, {"a": False, "b": False}, [0.3, 0.05], {}).per_defect
    aurocs = {(c, kind): metrics["image_auroc"] for c in found for kind, metrics in found[c].items()}
    assert aurocs == {("a", "hole"): 1.0, ("a", "cut"): 0.0, ("b", "hole"): 1.0}


# --- no test images ---


@pytest.mark.parametrize(("category", "method"), list(zip(UNTESTED, TRIED, strict=True)))
def test_without_test_images(category, method, root, tmp_path):
    """A user's own folder with nothing but normal images: trained, thresholds set, ready for prediction."""
    measured = method == TRIED[0]
    options = (*folder_data(root, category), *choose(method), f"hardware.measure_cost={measured}")
    succeeded(train(*options, f"hydra.run.dir={tmp_path / 'run'}"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    names = category.strip("[]").split(",")
    tested = "bottle" in names
    assert result["metrics"].keys() == result["per_category"]["untested"].keys()
    assert all(value is None for value in result["per_category"]["untested"].values())
    measured_keys = {key for key, value in result["metrics"].items() if value is not None}
    assert measured_keys == (result["metrics"].keys() - {"aupimo"} if tested else set())
    assert result["per_defect"]["untested"] == {}
    assert any(re.match("untested(, new)?: image_auroc, .*no test images$", note) for note in result["notes"])
    assert [result["thresholds"]["per_category"][name]["images"] for name in names] == [5] * len(names)
    assert (result["efficiency"]["flops_per_image"] is not None) == measured
    count = 9 if tested else 0
    assert np.load(tmp_path / "run" / "maps.npz")["maps"].shape == (count, 64, 64)
    assert len(rows_of(tmp_path / "run" / "scores.csv")) == count
    arguments = (f"run={tmp_path / 'run'}", f"input={root / 'wood' / 'test'}", f"output={tmp_path / 'out'}")
    succeeded(predict(*arguments, "category=untested", "quantile=0.5"))
    succeeded(evaluate(f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"))
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    for key in ("metrics", "per_category", "thresholds"):
        assert again[key] == result[key]
