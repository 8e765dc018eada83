"""Notes of result.json, and the versions in it."""

from importlib import metadata
from typing import Any

import numpy as np
import pytest

from anomalib_lite import __version__
from anomalib_lite.metrics.functional import image_metrics
from anomalib_lite.metrics.per_category import decisions, mean_metrics, measure_categories, ranking_notes
from anomalib_lite.runs import summary
from anomalib_lite.runs.summary import other_precision, threshold_notes
from anomalib_lite.runs.terminal import decision_lines


def test_thresholds_from_few_images_are_noted():
    """One note for all categories with fewer than 50 normal training images."""
    per_category = {name: {"images": count} for name, count in {"bottle": 49, "cable": 50, "tile": 3}.items()}
    (note,) = threshold_notes({"per_category": per_category})
    assert "fewer than 50 normal training images" in note
    assert note.endswith(": bottle (49), tile (3)")
    assert threshold_notes({"per_category": {"cable": {"images": 50}}}) == []


def outputs_of(scores: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    """The outputs of categories with these scores of good and of defective test images, without masks."""
    rows = [(name, label, score) for name, both in scores.items() for label in (0, 1) for score in both[label]]
    categories, labels, values = (np.array(column) for column in zip(*rows, strict=True))
    defects = np.where(labels == 1, "cut", "good")
    paths = np.array([str(i) for i in range(len(rows))])
    return {"categories": categories, "labels": labels, "scores": values, "defects": defects, "paths": paths}


def ranked(scores: dict[str, tuple[list[float], list[float]]]) -> list[str]:
    """`ranking_notes` at the image threshold 0.5."""
    outputs, limits = outputs_of(scores), {name: {"image": 0.5, "pixel": 0.5} for name in scores}
    metrics = {
        name: image_metrics(outputs["scores"][rows], outputs["labels"][rows])
        for name in scores
        if (rows := outputs["categories"] == name).any()
    }
    return ranking_notes(outputs, metrics, {name: x["good_flagged"] for name, x in decisions(outputs, limits).items()})


def test_an_image_auroc_below_chance_is_noted():
    """Only where it is significant: 0 with 3 good and 3 defective images, not with 2 and 3."""
    low, high = [0.1, 0.2, 0.3], [0.4, 0.4, 0.4]
    notes = ranked({"bottle": (low, high), "tile": (high, low), "wood": (high[:2], low), "zip": (high, [])})
    (note,) = notes
    assert note.startswith("tile (0.000): image AUROC is significantly below 0.5")
    assert "differ from the training images" in note
    assert note.endswith("labels or folders are exchanged")


def test_good_images_above_the_threshold_are_noted():
    """More than half of them, of 10 at least."""
    good = {"all": [1.0] * 10, "half": [1.0] * 5 + [0.0] * 5, "few": [1.0] * 9, "most": [1.0] * 6 + [0.0] * 4}
    (note,) = ranked({name: (scores, [2.0] * 10) for name, scores in good.items()})
    assert note.startswith("all (10 of 10), most (6 of 10): most good test images lie above the image threshold")


def test_one_note_for_each_reason_why_metrics_are_missing():
    outputs = outputs_of({"a": ([0.1], [0.2]), "b": ([], [0.2]), "c": ([], [0.3]), "d": ([0.1], [0.2])})
    outputs["categories"] = np.where(outputs["categories"] == "d", "a", outputs["categories"])
    found = measure_categories(outputs, dict.fromkeys("abcd", False), [0.3], {})
    pixel = "pixel_auroc, pixel_ap, pixel_f1max, aupro_30, aupimo, pixel_iou, pixel_dice"
    assert found.notes == [
        f"a, b, c: {pixel} can't be computed: no ground truth masks",
        "b, c: image_auroc, image_ap, image_f1max can't be computed: no good test images",
        f"d: image_auroc, image_ap, image_f1max, {pixel} can't be computed: no test images",
    ]
    means, (note,) = mean_metrics(found.per_category)
    assert means["image_auroc"] == found.per_category["a"]["image_auroc"]
    assert means["pixel_auroc"] is None
    assert note.endswith(
        "all 4 categories, but over those that have the metric: 1 for image_auroc, image_ap, image_f1max"
    )


@pytest.mark.parametrize(("before", "now", "noted"), [
    ("float32", "float32, frozen backbone in bf16", True),
    ("bf16, TF32 in training", "bf16", False),
    ("bf16", "float32", True),
    # in a test alone, networks that ran in bf16 in training may not have run
    ("float32, frozen backbone and the method's networks in bf16", "float32, frozen backbone in bf16", False),
    (None, "float32", False),
])  # fmt: skip
def test_another_precision_is_noted(before, now, noted):
    assert bool(other_precision(before, now)) == noted


def test_versions_in_a_checkout_without_git_and_installation(monkeypatch, tmp_path):
    """git and the package's metadata are missing: the run is trained by then, and must not be lost."""

    def version(package: str) -> str:
        if package == "anomalib-lite":
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(summary, "HOME", tmp_path)
    monkeypatch.setattr(summary, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = summary.software.__wrapped__()
    assert (found["anomalib_lite"], found["git"]) == (__version__, None)
    assert found["torch"] == metadata.version("torch")


def test_decisions_are_counted():
    """No share is rounded to all images, or to none."""
    found: dict[str, Any] = {
        "screw": {"defective_found": 249 / 250, "good_flagged": 1 / 300},
        "tile": {"defective_found": None, "good_flagged": None},
    }
    counts = {"screw": {"defective": 250, "good": 300}, "tile": {"defective": 0, "good": 0}}
    result = {"thresholds": {"quantile": 0.99, "from": "normal training images"}, "decisions": {"per_category": found}}
    expected = "249 of 250 defective images found, 1 of 300 good ones flagged"
    assert decision_lines(result | {"data": {"test_counts": counts}}) == [
        f"screw: at the threshold (0.99 quantile of normal training images) {expected}"
    ]
