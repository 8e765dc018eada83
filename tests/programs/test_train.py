"""Runs from the command line to the folder that they leave."""

import json
import re
from collections import Counter
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_lite.features.backbones import Backbone
from anomalib_lite.runs import artifacts as results
from anomalib_lite.runs.folder import read_run
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after
from tests.helpers.run_programs import rows_of
from tests.helpers.written_runs import compare

#: at least one method of each kind; tests/methods/test_contract.py has all of them
METHODS = ("norm_occ", "patchcore", "ssae", "ltad")
TRAINED = "norm_occ"  # a method with a budget, for what does not depend on the method
BASE = (
    "hardware=cpu", "backbone=resnet18", "backbone.name=test_resnet.r160_in1k", "backbone.weights=none",
    "data.image_size=32", "data.batch_size=4", "logger=csv", "hardware.measure_cost=false",
)  # fmt: skip
FILES = runs.FILES | {"figures/bottle.png"}
KEYS = {
    "schema", "method", "variant", "dataset", "categories", "setting", "split", "backbone", "weights", "seed",
    "protocol", "metrics", "per_category", "groups", "validation", "thresholds", "data", "timing", "efficiency",
    "cache", "environment", "overrides", "notes",
}  # fmt: skip
METRICS = {
    "image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro_30", "aupro_05",
    "aupimo", "pixel_iou", "pixel_dice",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=10, good=4, defects={"broken": 3, "bent": 2})
    make_mvtec(root, "wood", train=5, good=2, defects={"scratch": 3})
    return root


def start(run: Path, root: Path, *arguments: str, category: str = "bottle") -> runs.Outcome:
    """`train` with these arguments, after those of BASE that choose nothing else given here."""
    given = {argument.partition("=")[0] for argument in arguments}
    base = [option for option in BASE if option.partition("=")[0] not in given]
    return runs.train(*base, *runs.folder_data(root, category), *arguments, f"hydra.run.dir={run}", small=False)


def train(run: Path, root: Path, *arguments: str, category: str = "bottle") -> dict[str, Any]:
    """A run that must succeed; its result."""
    runs.succeeded(start(run, root, *arguments, category=category))
    return results.read_result(run)


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def budget():
    return "trainer.max_steps=5"  # 10 images in batches of 4: in the middle of the second epoch


@pytest.fixture(scope="module")
def finished(method, budget, root, tmp_path_factory):
    """The folder of a finished run of the method."""
    run = tmp_path_factory.mktemp(method) / "run"
    train(run, root, *runs.method(method), budget, "hardware.measure_cost=true")
    return run


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The folder of a run that the tests of one method share."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(run, root, f"method={TRAINED}", "trainer.max_epochs=1")
    return run


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """All but AUPIMO, for which these images have too few normal pixels."""
    assert metrics["aupimo"] is None
    return {key: value for key, value in metrics.items() if key != "aupimo"}


def image_metrics_by_sklearn(rows: list[dict[str, str]]) -> dict[str, float]:
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "image_auroc": roc_auc_score(labels, scores),
        "image_ap": average_precision_score(labels, scores),
        "image_f1max": float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))),
    }


def test_masks_without_a_defect_are_named(tmp_path):
    folder = make_mvtec(tmp_path / "data")
    cv2.imwrite(str(folder / "ground_truth/broken/001_mask.png"), np.zeros((32, 32), np.uint8))
    result = runs.result_of(
        *runs.folder_data(tmp_path / "data"), "method=norm_occ_closed_form", run_dir=tmp_path / "run"
    )
    told = "bottle: 1 defective images have no defective pixel in their masks, the first is 001.png"
    assert told in result["notes"]


# --- every kind of method ---


def test_the_folder_holds_what_is_promised(finished):
    extra = {"figures/training.png"}  # of corrupted training images, where there are any
    assert runs.files_of(finished) - extra == FILES
    assert cv2.imread(str(finished / "figures" / "bottle.png")) is not None
    assert "hydra" in yaml.safe_load((finished / ".hydra" / "hydra.yaml").read_text())
    config = yaml.safe_load((finished / ".hydra" / "config.yaml").read_text())
    assert config["data"]["image_size"] == 32
    assert "data.image_size=32" in yaml.safe_load((finished / ".hydra" / "overrides.yaml").read_text())


def test_result_says_everything(finished, method):
    result = results.read_result(finished)
    assert set(result) >= KEYS
    assert result["method"] == method
    assert (result["dataset"], result["categories"], result["setting"]) == ("folder", ["bottle"], "single")
    assert set(result["metrics"]) == METRICS
    assert result["metrics"] == result["per_category"]["bottle"]
    assert all(0 <= value <= 1 for value in measured(result["metrics"]).values())
    assert result["validation"] is None
    assert result["seed"] == 0
    assert result["split"]["name"] == "full"
    assert set(result["protocol"]) == {"data", "scoring"}
    assert set(result["data"]) == {"fingerprint", "train_counts", "train_anomalous", "test_counts"}
    assert result["data"]["train_counts"] == {"bottle": 10}
    assert result["data"]["test_counts"] == {"bottle": {"good": 4, "defective": 5}}
    assert {"fit_s", "steps", "test_s", "images_per_s", "peak_memory_mb"} <= set(result["timing"])
    assert result["environment"]["torch"] == version("torch")
    assert f"method={method}" in result["overrides"]
    assert "the backbone's weights are random" in result["notes"] or result["backbone"] is None


def test_image_metrics_are_scikit_learns_of_the_scores(finished):
    rows = rows_of(finished / "scores.csv")
    assert [row["path"].split("/")[:2] for row in rows] == [["bottle", "test"]] * 9
    assert Counter(row["defect"] for row in rows) == {"good": 4, "broken": 3, "bent": 2}
    metrics = results.read_result(finished)["metrics"]
    expected = image_metrics_by_sklearn(rows)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-12)


def test_maps_are_stored_small(finished):
    stored = np.load(finished / "maps.npz")
    assert stored["maps"].shape == (9, 64, 64)
    assert stored["maps"].dtype == np.float16
    assert stored["paths"].tolist() == [row["path"] for row in rows_of(finished / "scores.csv")]
    maps = stored["maps"].astype(np.float32) * stored["scale"]
    scores = [float(row["score"]) for row in rows_of(finished / "scores.csv")]
    np.testing.assert_allclose(maps.max((1, 2)), scores, rtol=0.1)  # 32² brought to 64²
    assert any(name.startswith("bottle/") for name in stored.files)


def test_the_checkpoint_holds_no_code(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert not list(finished.rglob("*.part"))


def test_parameters_and_cost_are_counted(finished):
    result = results.read_result(finished)
    with runs.restored():
        _, model = runs.build(read_run(finished)[1])
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    named = dict(model.named_parameters())
    assert result["efficiency"]["parameters"] == sum(state[name].numel() for name in named)
    assert result["efficiency"]["trainable"] == sum(p.numel() for p in named.values() if p.requires_grad)
    assert 0 < result["efficiency"]["flops_per_image"] < 1e12
    assert {"latency_ms", "images_per_s", "batch_size", "peak_memory_mb"} <= set(result["timing"])


def test_another_seed_gives_another_result(trained, root, tmp_path):
    """That the same seed gives the same result is tested for every method in tests/methods/test_contract.py."""
    train(tmp_path / "run", root, f"method={TRAINED}", "trainer.max_epochs=1", "seed=1")
    assert (tmp_path / "run" / "scores.csv").read_bytes() != (trained / "scores.csv").read_bytes()


def test_resuming_a_finished_run_does_nothing(finished, method, budget, root):
    before = {file: (finished / file).stat().st_mtime_ns for file in FILES - {"train.log"}}
    outcome = start(finished, root, *runs.method(method), budget, "resume=true", "hardware.measure_cost=true")
    assert outcome.code == 0
    assert "this run is finished" in outcome.out
    assert "AUROC" in outcome.out
    assert {file: (finished / file).stat().st_mtime_ns for file in before} == before


def test_evaluating_again_gives_the_same(finished, tmp_path):
    runs.succeeded(runs.evaluate(f"run={finished}", f"output={tmp_path / 'again'}"))
    first, again = results.read_result(finished), results.read_result(tmp_path / "again")
    for key in KEYS - {"timing", "environment", "overrides", "notes", "cache"}:
        assert again[key] == first[key], key
    assert set(again["notes"]) == {*first["notes"], f"evaluated again from {finished}"}
    assert (tmp_path / "again" / "scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()
    stored = [np.load(run / "maps.npz") for run in (finished, tmp_path / "again")]
    assert stored[0].files == stored[1].files
    assert all(np.array_equal(stored[0][name], stored[1][name]) for name in stored[0].files)


def test_evaluating_under_another_protocol(trained, tmp_path):
    runs.succeeded(runs.evaluate(f"run={trained}", f"output={tmp_path / 'again'}", "scoring.pixel_smooth=2"))
    first, again = results.read_result(trained), results.read_result(tmp_path / "again")
    assert again["protocol"]["scoring"] == first["protocol"]["scoring"] | {"pixel_smooth": 2}
    assert again["protocol"]["data"] == first["protocol"]["data"]
    maps = [np.load(run / "maps.npz")["maps"] for run in (trained, tmp_path / "again")]
    assert not np.array_equal(*maps)
    assert again["thresholds"] != first["thresholds"]


def test_thresholds_come_from_normal_training_images(finished):
    checkpoint, cfg, _ = read_run(finished)
    with runs.restored():
        data, model = runs.build(cfg)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.eval()
    with torch.no_grad():
        scored = [model.score(batch | {"is_train_image": True}) for batch in data.train_eval_dataloader()]
    scores = np.concatenate([x["score"].double() for x in scored])
    peaks = np.concatenate([x["map"].amax((1, 2)).double() for x in scored])
    assert len(scores) == 10
    thresholds = results.read_result(finished)["thresholds"]
    assert (thresholds["quantile"], thresholds["from"]) == (0.99, "normal training images")
    expected = {"image": np.quantile(scores, 0.99), "pixel": np.quantile(peaks, 0.99), "images": 10}
    found = thresholds["per_category"]["bottle"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["norm_occ", "patchcore", "ssae"])
def test_one_model_for_two_categories(name, budget, root, tmp_path):
    """Other methods train on two categories in tests/methods/test_contract.py."""
    result = train(tmp_path / "run", root, *runs.method(name), budget, category="[bottle,wood]")
    assert result["setting"] == "unified"
    assert result["categories"] == list(result["per_category"]) == ["bottle", "wood"]
    assert list(result["thresholds"]["per_category"]) == ["bottle", "wood"]
    for key in measured(result["metrics"]):
        values = [result["per_category"][category][key] for category in ("bottle", "wood")]
        assert result["metrics"][key] == pytest.approx(np.mean(values), abs=1e-12)
    rows = rows_of(tmp_path / "run" / "scores.csv")
    for category in ("bottle", "wood"):
        expected = image_metrics_by_sklearn([row for row in rows if row["category"] == category])
        found = result["per_category"][category]
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert {"figures/bottle.png", "figures/wood.png"} <= runs.files_of(tmp_path / "run")


@pytest.mark.parametrize("name", ["norm_occ", "patchcore", "ssae"])
def test_validation_on_held_out_training_images(name, budget, root, tmp_path):
    arguments = (*runs.method(name), budget, "data.val_fraction=0.4")
    result = train(tmp_path / "run", root, *arguments)
    assert result["data"]["train_counts"] == {"bottle": 6}
    assert set(result["validation"]) == METRICS
    assert all(0 <= value <= 1 for value in measured(result["validation"]).values())
    assert result["thresholds"]["per_category"]["bottle"]["images"] == 6
    assert len(rows_of(tmp_path / "run" / "scores.csv")) == 9  # the test set alone


# --- what does not depend on the method ---


@pytest.fixture
def seen():
    """The batches that go through a frozen backbone from now on, by their sizes."""
    sizes: list[int] = []

    def note(module, inputs, output):
        if isinstance(module, Backbone):
            sizes.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    yield sizes
    hook.remove()


def test_frozen_features_are_computed_once(root, seen, tmp_path):
    """In files that a second run finds, in memory, or for every batch anew: the same results."""
    budget = (
        f"method={TRAINED}",
        "trainer.max_epochs=3",
        "trainer.max_steps=null",
        f"cache.folder={tmp_path / 'cache'}",
        "hardware.measure_cost=true",
    )
    off = ("cache.enabled=false",)
    runs_: dict[str, tuple[tuple[str, ...], list[int], dict[str, Any]]] = {
        "cached": ((), [16, 16], {"used": True, "images": 19, "computed": 19}),  # whole batches, of train and test
        "again": ((), [], {"used": True, "images": 19, "computed": 0}),
        "memory": (off, [16, 9], {"used": False}),  # every training image, every test image
        # moments, r0, three epochs, test, thresholds
        "anew": ((*off, "hardware.feature_memory_gb=0"), [10, 10, *3 * [4, 4, 2], 9, 10], {"used": False}),
    }
    results = {}
    for name, (options, passes, report) in runs_.items():
        seen.clear()
        results[name] = train(tmp_path / name, root, *budget, *options)
        assert list(takewhile(lambda size: size > 1, seen))[: len(passes)] == passes, name
        if passes:  # afterwards speed is measured, on a single image first
            assert seen[len(passes)] == 1
        assert report.items() <= results[name]["cache"].items()
    for name in runs_:
        for key in ("metrics", "thresholds"):
            assert results[name][key] == results["cached"][key]
        assert (tmp_path / name / "scores.csv").read_bytes() == (tmp_path / "cached" / "scores.csv").read_bytes()


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (("trainer.max_steps=5", "trainer.max_epochs=null"), 5),
        (("trainer.max_steps=5", "trainer.max_epochs=1"), 3),
        (("trainer.max_steps=3", "trainer.max_epochs=1"), 3),
        (("trainer.max_steps=2", "trainer.max_epochs=4"), 2),
        (("trainer.max_steps=null", "trainer.max_epochs=2"), 6),
        (("trainer.max_epochs=2", "data.drop_last=true"), 4),
        (("trainer.max_epochs=0",), 0),
    ],
)
def test_budgets_count_batches_whichever_comes_first(root, tmp_path, budget, steps):
    result = train(tmp_path / "run", root, f"method={TRAINED}", "trainer.log_every=1", *budget)
    assert result["timing"]["steps"] == steps
    file = tmp_path / "run" / "metrics.csv"
    if steps:
        assert [int(row["step"]) for row in rows_of(file)] == list(range(1, steps + 1))


def test_a_closed_form_ignores_the_budget(root, tmp_path):
    """So that a sweep can give one budget to all its methods."""
    for name, budget in (("plain", ()), ("budget", ("trainer.max_epochs=2", "trainer.max_steps=5"))):
        result = train(tmp_path / name, root, "method=norm_occ_closed_form", *budget)
        assert result["timing"]["steps"] == 0
    assert (tmp_path / "plain" / "scores.csv").read_bytes() == (tmp_path / "budget" / "scores.csv").read_bytes()


def test_training_learns(root, tmp_path):
    train(tmp_path / "run", root, f"method={TRAINED}", "trainer.max_epochs=6", "trainer.log_every=1")
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run" / "metrics.csv")]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def strict(file: Path) -> Any:
    """The content of a JSON file that holds neither NaN nor Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file}: {constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def test_an_infinite_option_is_text_in_a_runs_files(root, tmp_path):
    """method.p=inf is a number for Hydra; JSON has no such number. It and the text train, resume and evaluate alike."""
    shell = (*BASE, *runs.folder_data(root, "bottle"), "method=norm_occ", "method.target=shell", "trainer.max_steps=3")
    shell = (*shell, "trainer.checkpoint_minutes=0")
    sweep = runs.train("-m", *shell, "method.p=2,inf", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert sweep.code == 0, sweep.err
    two, number = tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"
    text = tmp_path / "text"
    with interrupted_after(2):
        runs.train(*shell, "method.p='inf'", f"hydra.run.dir={text}")
    assert runs.train(*shell, "method.p=inf", "resume=true", f"hydra.run.dir={text}").code == 0
    assert_same_run(text, number)
    for run in (number, text):
        assert strict(run / "checkpoints" / "config.json")["config"]["method"]["p"] == "inf"
        strict(run / "result.json")
    assert (number / "scores.csv").read_bytes() != (two / "scores.csv").read_bytes()
    evaluated = runs.evaluate(f"run={number}", f"output={tmp_path / 'again'}")
    assert evaluated.code == 0, evaluated.err
    assert (tmp_path / "again" / "scores.csv").read_bytes() == (number / "scores.csv").read_bytes()
    table = compare(tmp_path / "sweep")
    assert table.code == 0, table.err
    assert "norm_occ (p=inf)" in table.out
    assert "norm_occ (p=2)" in table.out


def test_a_second_run_into_the_same_folder_is_refused(trained, root):
    before = (trained / "result.json").read_bytes()
    outcome = start(trained, root, f"method={TRAINED}", "trainer.max_epochs=1")
    assert outcome.code == 2
    assert re.fullmatch(r"error: .* already holds a run: add resume=true .*\n", outcome.err)
    assert (trained / "result.json").read_bytes() == before


def test_evaluate_refuses_what_training_depends_on(trained, tmp_path):
    for option, message in (
        ("data.image_size=64", "data.image_size can't be changed without training anew"),
        ("scoring.blur=3", "scoring.blur: the run's configuration has no such key"),
        ("scoring.image_score=best", "scoring.image_score=best: give max"),
    ):
        runs.assert_refused(runs.evaluate(f"run={trained}", f"output={tmp_path / 'again'}", option), message)
    assert not (tmp_path / "again").exists()


def test_evaluate_does_not_overwrite(trained, tmp_path):
    outcome = runs.evaluate(f"run={trained}", f"output={trained}")
    assert outcome.code == 2
    assert "already holds results" in outcome.err
    assert runs.evaluate(f"run={tmp_path / 'none'}", f"output={tmp_path / 'again'}").code == 2
