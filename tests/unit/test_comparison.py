"""Statistics against SciPy, scikit-learn and plain loops; tables of runs whose numbers are known."""

import base64
import csv
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import wilcoxon
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_lite.cli.keys import assign
from anomalib_lite.comparison import statistics, terminal
from anomalib_lite.comparison.export import between, caption, notes, percent, render, to_csv
from anomalib_lite.comparison.find_runs import config_of
from anomalib_lite.comparison.page import to_html
from anomalib_lite.comparison.plots import plot_metric
from anomalib_lite.comparison.tables import Column, Over
from anomalib_lite.comparison.worst_cases import worst_cases
from anomalib_lite.evaluate import with_absolute_places
from anomalib_lite.runs.decisions import score_text
from anomalib_lite.runs.folder import absolute_places, stored_config
from anomalib_lite.runs.heat_maps import chosen_cases, disagreement
from tests.helpers.image_trees import make_mvtec
from tests.helpers.written_runs import compare, tables

# statistics


def plain_f1max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


PLAIN = {"image_auroc": roc_auc_score, "image_ap": average_precision_score, "image_f1max": plain_f1max}


@pytest.mark.parametrize("metric", PLAIN)
def test_draws_are_the_metric_of_each_resample(metric):
    rng = np.random.default_rng(1)
    labels = np.array([1] * 9 + [0] * 6)
    scores = np.round(rng.normal(labels, size=(3, 15)), 1)  # with ties; three seeds
    drawn = statistics.resamples(labels, 40, seed=5)
    assert (drawn[:, labels == 1].sum(1) == 9).all()
    assert (drawn[:, labels == 0].sum(1) == 6).all()
    found = statistics.DRAWS[metric](drawn, labels, scores)
    for draws, counts in zip(found, drawn.astype(int), strict=True):
        rows = np.repeat(np.arange(15), counts)
        assert draws == pytest.approx(np.mean([PLAIN[metric](labels[rows], one[rows]) for one in scores]), abs=1e-12)


def test_interval_against_a_plain_loop():
    rng = np.random.default_rng(2)
    labels = np.array([1] * 40 + [0] * 30)
    scores = rng.normal(labels)
    found, again = (
        statistics.interval(statistics.auroc_draws(statistics.resamples(labels), labels, scores[None])) for _ in "ab"
    )
    loop = []
    for _ in range(2000):
        bad, good = rng.choice(scores[:40], 40), rng.choice(scores[40:], 30)
        loop.append(np.mean(bad[:, None] > good))
    assert found == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])), abs=0.012)
    assert found == again  # seeded


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]).tolist() == [1, 1]


def test_wilcoxon():
    a, b = np.random.default_rng(0).uniform(size=(2, 9))
    assert statistics.wilcoxon(a, b) == pytest.approx(wilcoxon(a, b).pvalue, rel=1e-12)
    for n in (6, 11, 15, 40):
        x, y = np.random.default_rng(n).normal(0.4, size=(2, n)) * [[1], [0.5]]
        assert statistics.wilcoxon(x, y) == pytest.approx(wilcoxon(x, y, method="exact").pvalue, rel=1e-9)
    x, y = np.array([1, 1, 2, 3, 3, 5, 0]), np.array([0, 2, 0, 0, 6, 0, 0])  # ties, and a pair that is equal
    assert statistics.wilcoxon(x, y) == pytest.approx(wilcoxon((x - y)[:-1]).pvalue)
    # all six better: the exact two-sided p is 2 / 2^6
    assert statistics.wilcoxon(np.arange(1, 7), np.zeros(6)) == pytest.approx(2 / 64)
    assert statistics.wilcoxon([0.1 + 0.2, 1], [0.3, 1]) == 1


def test_worst_cases():
    labels, scores = np.array([1, 0, 1, 0, 0]), np.array([0.1, 0.9, 0.8, 0.2, 0.2])
    assert disagreement(labels, scores).tolist() == [1, 1, 0.25, 0.375, 0.375]
    cases = chosen_cases([0, 1, 2, 3], {"labels": labels, "scores": scores}, 1)  # of a run's figures
    assert cases == [("clear defect", 2), ("weakest defect", 0), ("highest good", 1)]


# tables


def values_by_seed(row, category, metric) -> list[float]:
    """What the results on disk hold."""
    results = (json.loads((run.folder / "result.json").read_text()) for run in row.runs[category].values())
    return [result["per_category"][category][metric] for result in results]


def test_seeds_are_averaged_and_other_keys_are_not(write):
    for norm in (0.1, 10):
        for seed in (0, 1, 2):
            for category in ("bottle", "cable"):
                write("norm_occ", (category,), seed, config={"norm": norm, "target": "point"})
    (table,) = tables(write)
    assert [row.label for row in table.rows] == ["norm_occ (norm=0.1)", "norm_occ (norm=10)"]
    for row in table.rows:
        cells = table.cells(row, "pixel_ap")
        values = [values_by_seed(row, category, "pixel_ap") for category in ("bottle", "cable")]
        columns: list[Column] = ["bottle", "cable", Over.MEAN]
        for column, of in zip(columns, [*values, np.mean(values, 0)], strict=True):
            assert (cells[column].mean, cells[column].sd) == pytest.approx((np.mean(of), np.std(of, ddof=1)))
            assert cells[column].seeds == 3


def test_an_option_that_the_method_got_later_makes_no_other_row(write):
    """Its value is null, which changes nothing; another value makes another row."""
    write("a", seed=0)
    write("a", seed=1, config={"clip": None})
    write("a", seed=0, config={"clip": 0.1})
    (table,) = tables(write)
    assert [(row.label, len(row.runs["bottle"])) for row in table.rows] == [("a (clip=0.1)", 1), ("a (clip=–)", 2)]


def terminal_text(table, width=120) -> str:
    shown = io.StringIO()
    terminal.show(Console(width=width, file=shown), table, ["image_auroc"])
    return shown.getvalue()


def markdown_of(table) -> str:
    return render("table.md", [table], "image_auroc").partition("| fit")[2]


def test_nothing_is_folded_in_a_narrow_terminal(write):
    """Cells with a mark, a deviation and an interval, and the costs, are shown in blocks."""
    for method, quality in (("a long name", 1), ("one that is longer", 9)):
        for seed in range(4):
            for category in ("bottle", "cable", "pill"):
                write(method, (category,), seed, quality, timing__peak_memory_mb={"host": 2e6 + seed})
    (table,) = tables(write)
    shown = terminal_text(table, 80)
    for row in table.rows:
        for cell in table.cells(row, "image_auroc").values():
            assert f"{'*' * cell.best}{percent(cell)} " in shown
            assert between(cell) in shown
    for words in ("latency", "parameters", "trained", "GFLOP/image", "1,953"):
        assert f" {words} " in shown.replace("\n", " ")


def test_the_heading_is_not_folded_over_short_labels(write):
    write("a")
    (table,) = tables(write)
    assert terminal_text(table, 120).count("\n method ") == 2  # of the metric and of the costs


def test_labels(write):
    write("a", config={"target": "point", "norm": 1})
    write("a", config={"target": "shell", "norm": 1})
    write("b", backbone__name="wide_resnet50_2.tv_in1k")
    again = write("c", notes=[f"evaluated again from {write('c')}"], protocol__scoring__pixel_smooth=2)
    shutil.rmtree(again / "checkpoints")
    (table,) = tables(write)
    name = json.loads((write.root / "run0000" / "result.json").read_text())["backbone"]["name"]
    assert [row.label for row in table.rows] == [
        f"a {name} (target=point)",
        f"a {name} (target=shell)",
        "b wide_resnet50_2.tv_in1k",
        f"c {name} (pixel_smooth=2)",
        f"c {name} (pixel_smooth=4)",
    ]
    assert any(note.startswith("scoring.pixel_smooth differs") for note in table.notes)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"thresholds__quantile": 0.9}, ["quantile=0.9", "quantile=0.99"]),
        ({"overrides": ["hardware.precision=32"]}, ["precision=32", "precision=auto"]),
        ({"overrides": ["scoring.threshold_images=null"]}, ["threshold_images=2000", "threshold_images=null"]),
    ],
)
def test_evaluations_that_differ_are_other_rows(changes, values, write):
    """They have the seed of the run that they evaluate again."""
    again = write("a", notes=[f"evaluated again from {write('a')}"], **changes)
    shutil.rmtree(again / "checkpoints")
    (table,) = tables(write)
    assert [row.label for row in table.rows] == [f"a ({value})" for value in values]
    assert not any("run again" in note for note in table.notes)


def test_weights_files_of_one_name_are_different_rows(write):
    """The hash of the file's content is stored with the configuration, also of a run that is evaluated again."""
    for seed, digit in ((0, "a"), (1, "a"), (0, "b")):
        file = write("a", seed=seed, weights="w.pth") / "checkpoints" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"digests": {"backbone.weights": 64 * digit}}))
    notes = [f"evaluated again from {write.root / 'run0002'}"]
    shutil.rmtree(write("a", seed=1, weights="w.pth", notes=notes) / "checkpoints")
    (table,) = tables(write)
    assert [row.label for row in table.rows] == ["a (weights=w.pth (aaaaaaaa))", "a (weights=w.pth (bbbbbbbb))"]
    assert [len(row.runs["bottle"]) for row in table.rows] == [2, 2]


def test_latency_beside_other_jobs_is_marked(write):
    write("a", timing__beside={"jobs": 2, "busy_cores": 1.7})
    write("b", timing__beside={"jobs": 0, "busy_cores": 0.0})
    write("c", timing__beside=None)
    (table,) = tables(write)
    assert [note for note in table.notes if note.startswith("latency")] == [
        "latency and images/s do not compare where other jobs ran on the machine: a (2 jobs)"
    ]


def test_versions_of_a_module_of_the_users_own(write):
    """Runs of one row that used different ones are noted; runs of earlier versions of the package stored none."""
    write("a", seed=0)
    for method, seed, version in (("a", 1, "x"), ("a", 2, "x"), ("b", 0, "y")):
        write(method, seed=seed, environment__modules={"mine": version})
    (table,) = tables(write)
    assert not [note for note in table.notes if "module" in note]
    write("a", seed=3, environment__modules={"mine": "y"})
    (table,) = tables(write)
    assert "averaged over runs of several versions of one module (environment.modules): a" in table.notes


def test_ties_within_rounding_are_all_best(write):
    for method, value in (("a", 0.9811), ("b", 0.9812), ("c", 0.9799)):
        write(method, per_category={"bottle": {"image_auroc": value}})
    (table,) = tables(write)
    marked = [cells["bottle"].best for cells in table.body("image_auroc")["single"].values()]
    assert marked == [True, True, False]


def test_no_row_is_best_where_all_are_equal(write):
    for method in "ab":
        write(method, per_category={"bottle": {"image_auroc": 0.0}})
    (table,) = tables(write)
    assert [cells["bottle"].best for cells in table.body("image_auroc")["single"].values()] == [False, False]


def test_missing_categories_and_null_metrics(write):
    write("a", ("bottle",))
    write("a", ("cable",))
    write("b", ("bottle",))
    write("c", ("bottle",), per_category={"bottle": {"image_auroc": None, "image_ap": 0.5}})
    write("c", ("cable",))
    (table,) = tables(write)
    cells = {row.label: table.cells(row, "image_auroc") for row in table.rows}
    assert {label: Over.MEAN in of for label, of in cells.items()} == {"a": True, "b": False, "c": False}
    lines = ["without image_auroc of cable, so no mean: b", "without image_auroc of bottle, so no mean: c"]
    assert notes(table, "image_auroc")[1:3] == lines
    outcome = compare(write.root)
    assert outcome.code == 0
    assert "mean ± standard deviation" not in outcome.out
    assert "image AUROC in percent, one seed, the best" in outcome.out
    assert "–" in outcome.out


@pytest.mark.parametrize(
    ("dataset", "note"),
    [
        ("mvtec", ["development data: bottle (defaults were chosen on them)"]),
        ("visa", []),
        ("folder", ["bottle: names of our development data; if these are its images, defaults were chosen on them"]),
        ("real_iad", []),
    ],
)
def test_development_data_are_named(dataset, note, write):
    """A data set of another name, or a user's own folder, may have categories with the same names."""
    write("a", ("bottle", "cable"), dataset=dataset)
    (table,) = tables(write)
    assert [each for each in table.notes if "defaults were chosen" in each] == note


def test_runs_of_before_without_aupimo_and_overlap(write):
    new = {"aupimo": 0.4, "pixel_iou": 0.3, "pixel_dice": 0.5}
    for method in ("old", "new"):
        for seed in (0, 1):
            write(method, seed=seed)
    for folder in write.root.iterdir():
        result = json.loads((folder / "result.json").read_text())
        metrics = result["per_category"]["bottle"]
        if result["method"] == "new":
            metrics |= new | {"aupimo": None if result["seed"] else 0.4}
        else:
            result["per_category"]["bottle"] = {key: value for key, value in metrics.items() if key not in new}
        (folder / "result.json").write_text(json.dumps(result))
    (table,) = tables(write)
    assert set(new) < set(table.metrics)
    cells = {row.method: table.cells(row, "pixel_dice").get("bottle") for row in table.rows}
    assert (cells["old"], cells["new"] and (cells["new"].mean, cells["new"].seeds)) == (None, (0.5, 2))
    for metric in new:
        outcome = compare(write.root, "--metric", metric)
        assert (outcome.code, outcome.err) == (0, "")
        assert {"aupimo": "AUPIMO", "pixel_iou": "pixel IoU", "pixel_dice": "pixel Dice"}[metric] in outcome.out
        assert f"without {metric} of bottle: old" in outcome.out
    assert "AUPIMO" not in compare(write.root).out


def test_paired_tests(write):
    names = [f"k{i}" for i in range(6)]
    for i, name in enumerate(names):
        for method, value in (("a", 0.9 - 0.01 * i), ("b", 0.8 - 0.013 * i), ("c", 0.5 + 0.1 * (i % 2))):
            for seed in (0, 1):
                write(method, (name,), seed, per_category={name: {"image_auroc": value + 0.001 * seed}})
    (table,) = tables(write)
    tests = table.tests("image_auroc")
    raw = {}
    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        x, y = ([table.means(row, "image_auroc")[n] for n in names] for row in table.rows if row.label in (a, b))
        raw[a, b] = wilcoxon(np.round(np.subtract(x, y), 12)).pvalue
    expected = dict(zip(raw, statistics.holm(list(raw.values())), strict=True))
    assert {(a, b): p for a, b, _, p, n in tests if n == 6} == pytest.approx(expected)
    assert any("3 pairs" in note for note in notes(table, "image_auroc"))
    shutil.rmtree(write.root / "run0000")
    shutil.rmtree(write.root / "run0001")  # a has five categories now
    assert len(tables(write)[0].tests("image_auroc")) == 1


def test_fewer_than_six_categories_are_not_tested(write):
    for name in "vwxyz":
        write("a", (name,))
        write("b", (name,))
    (table,) = tables(write)
    assert table.tests("image_auroc") == []
    assert "no paired tests: fewer than 6 categories in common" in notes(table, "image_auroc")


def test_what_does_not_compare_is_apart_and_named(write):
    write("a")
    write("b", protocol__data__map_size=[64, 64])
    write("c", data__fingerprint="other")
    write("d", split={"name": "exp100"})
    write("e", dataset="visa")
    found = tables(write)
    assert [[row.label for row in table.rows] for table in found] == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert "protocol.data.map_size differs ([64, 64], there [32, 32])" in found[1].notes[0]
    assert "data.fingerprint differs; here: " in found[2].notes[0]
    assert "split.profile differs" in found[3].notes[0]
    assert not any("does not compare" in note for note in found[4].notes)
    outcome = compare(write.root)
    assert outcome.code == 0
    assert "table 2: " in outcome.out
    assert "run0001" in outcome.out


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_other_images_of_one_category_are_apart_with_all_of_their_folder(write, order):
    """A reduced copy of bottle, and the whole data set: no row mixes them, whichever run is found first."""
    runs = [("/reduced", "bottle"), ("/whole", "bottle"), ("/whole", "cable")]
    for root, category in (runs[number] for number in order):
        write("a", (category,), root=root, dataset="mvtec", data__fingerprint=f"{root} {category}")
    assert sorted(table.categories for table in tables(write)) == [["bottle"], ["bottle", "cable"]]


def test_images_that_changed_are_joined_with_their_copies(write):
    """Seed 0 ran before a mask was corrected, seed 2 on a copy of the corrected folder."""
    for seed, (root, fingerprint) in enumerate([("/r", "before"), ("/r", "after"), ("/copy", "after")]):
        write("a", ("bottle",), seed, root=root, dataset="mvtec", data__fingerprint=fingerprint)
    assert [sorted(run.seeds[0] for run in table.runs) for table in tables(write)] == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("key", "values", "rows"),
    [
        ("cache.dtype", ("float32", "bfloat16"), 2),
        ("objective", ("validation.pixel_ap", "validation.image_auroc"), 1),
        ("data.val_fraction", (0, 0.0), 1),
        ("data.val_fraction", (0, 0.1), 2),
    ],
)
def test_which_keys_make_rows(write, key, values, rows):
    for seed, value in enumerate(values):
        file = write("a", seed=seed) / "checkpoints" / "config.json"
        stored = json.loads(file.read_text())
        assign(stored["config"], key, value)
        file.write_text(json.dumps(stored))
    (table,) = tables(write)
    assert len(table.rows) == rows


def test_a_whole_number_is_the_same_imbalance(write):
    for imbalance in (100, 100.0):
        split = {"name": "exp", "profile": "exp", "imbalance": imbalance, "order": "size", "seed": 0}
        write("a", seed=int(isinstance(imbalance, float)), split=split)
    (table,) = tables(write)
    assert table.title.endswith("split exp100")
    assert len(table.rows) == 1


def test_runs_in_several_precisions_are_named(write):
    for seed, precision in enumerate(("float32", "float32, networks in bf16")):
        write("a", seed=seed, environment__precision=precision)
        write("b", seed=seed)
    (table,) = tables(write)
    assert "averaged over runs in several precisions (environment.precision): a" in table.notes


def test_differences_are_short(write):
    """One cause is named once, a long list is cut, and a path is shown as it is written."""
    ours = {"filter": "bilinear", "as": "PIL, antialiased"}
    own = [{"_target_": f"albumentations.{name}", "height": 200, "width": 200} for name in ("Resize", "CenterCrop")]
    for root, size in (("/x/Böses Teil", 32), ("/y/Böses Teil", 32), ("/x/Böses Teil", 96)):
        data = {"transform": [{"resize": [size, size]} | ours], "map_size": [size, size]}
        write("a", root=root, protocol__data=data, data__fingerprint=f"{root}{size}")
    write("a", root="/x/Böses Teil", protocol__data={"transform": own, "map_size": [32, 32]})
    first, moved, larger, other = tables(write)
    assert not [note for note in first.notes if "compare" in note]
    start = "does not compare with table 1: "
    assert moved.notes[0].startswith(f"{start}data.root differs (/y/Böses Teil, there /x/Böses Teil); here: ")
    assert larger.notes[0].startswith(f"{start}protocol.data.transform.resize differs ([96, 96], there [32, 32]); here")
    assert len(other.notes[0]) < 300 + len(str(write.root))
    assert all(sum("does not compare" in note for note in table.notes) == 1 for table in (moved, larger, other))


def test_unified_and_single_are_row_groups(write):
    write("a", ("bottle", "cable"))
    write("a", ("bottle",))
    write("a", ("cable",))
    (table,) = tables(write)
    assert list(table.body("image_auroc")) == ["single", "unified"]
    names = [row.full_label for row in table.rows]
    assert names == ["a [single]", "a [unified]"]
    shown, page = terminal_text(table), to_html([table], "image_auroc")
    costs = shown.partition("latency")[2], page.partition("Time, memory, parameters")[2], markdown_of(table)
    assert all(name.replace("[", r"\[").replace("]", r"\]") in costs[2] for name in names)
    assert all(name in text for name in names for text in costs[:2])
    assert [line for line in notes(table, "image_auroc") if "without" in line] == []


def test_unified_models_of_other_categories_are_other_rows(write):
    """No mean mixes models; models of the same categories are repetitions."""
    names = [f"k{i}" for i in range(6)]
    for categories, seed in ((names[:2], 0), (names[:2], 1), (names, 0), (names[2:], 0)):
        write("a", categories, seed)
    (table,) = tables(write)
    labels = ["[k0, k1, k2, k3 and 2 more]", "[k0, k1]", "[k2, k3, k4, k5]"]
    assert [row.label for row in table.rows] == [f"a (categories={names})" for names in labels]
    assert [Over.MEAN in table.cells(row, "image_auroc") for row in table.rows] == [True, False, False]
    assert [len(row.all_runs()) for row in table.rows] == [1, 2, 1]


def test_values_that_look_alike_keep_their_quotes(write):
    for value in (1, "1", None):
        write("a", config={"norm": value})
    (table,) = tables(write)
    assert [row.label for row in table.rows] == ["a (norm=1)", 'a (norm="1")', "a (norm=–)"]  # null: as not given


X, Y = "/x/parts", "/y/parts"


@pytest.mark.parametrize(
    ("runs", "titles"),
    [  # of the runs: root, category, fingerprint
        ([(X, "a", "1"), ("/x/screws", "b", "2")], ["folder parts", "folder screws"]),
        ([(X, "a", "1"), (Y, "b", "2")], ["folder x/parts", "folder y/parts"]),
        ([(X, "a", "1"), (Y, "a", "2")], ["folder x/parts", "folder y/parts"]),
        ([("/parts", "a", "1"), (X, "b", "2")], ["folder /parts", "folder x/parts"]),
        ([(X, "a", "1"), ("/x/parts/", "b", "2"), ("/x/./q/../parts", "c", "3")], ["folder parts"]),
        ([(X, "a", "1"), ("/moved/here", "b", "2"), ("/moved/here", "a", "1")], ["folder parts"]),
        ([(X, "a", "1"), (None, "a", "1"), (Y, "b", "2")], ["folder x/parts", "folder y/parts"]),
        ([(X, "a", "1"), (None, "b", "2"), (None, "c", "3"), ("/c", "c", "3")], ["folder parts", "folder", "folder c"]),
    ],
)
def test_the_root_belongs_to_the_data_set(runs, titles, write):
    """None: the configuration is gone. Only equal files make two roots one data set."""
    for root, category, fingerprint in runs:
        folder = write("a", (category,), root=root, data__fingerprint=fingerprint)
        if root is None:
            shutil.rmtree(folder / "checkpoints")
    found = tables(write)
    assert [table.title for table in found] == titles
    first = [table.notes for table in found[1:]]
    assert all(notes[0].startswith("does not compare with table 1: data.root differs") for notes in first)
    csv_lines = list(csv.DictReader(to_csv(found, [run for table in found for run in table.runs]).splitlines()))
    assert {line["dataset"] for line in csv_lines} == set(titles)


def test_roots_of_one_data_set(write, tmp_path):
    """A known data set lies anywhere; a link is the folder; an evaluation of other images has their root."""
    for root in (X, Y):
        write("a", (root[1],), root=root, dataset="mvtec")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    trained, _ = (write("a", (name,), root=tmp_path / name) for name in ("real", "link"))
    other = [f"data.root={tmp_path / 'other'}"]
    again = write("a", ("other",), notes=[f"evaluated again from {trained}"], overrides=["run=x", *other])
    shutil.rmtree(again / "checkpoints")
    assert [(table.title, table.categories) for table in tables(write)] == [
        ("mvtec", ["x", "y"]), ("folder real", ["link", "real"]), ("folder other", ["other"]),
    ]  # fmt: skip


def test_an_evaluation_of_moved_images_has_their_places(tmp_path, monkeypatch):
    """With absolute paths, whatever characters they have; relative ones of earlier versions lead nowhere."""
    monkeypatch.chdir(tmp_path)
    given = {"normal": "new, (1)", "abnormal": ["é b", "/c"], "masks": None}
    config = {"data": {key: absolute_places(value) for key, value in given.items()}}
    arguments = ["run=run", "data.normal=new, (1)", "data.abnormal=[é b,/c]", "data.masks=null"]
    overrides = [with_absolute_places(argument, config) for argument in arguments]
    assert overrides[0] == "run=run"
    old = {"normal": "/old/ok", "abnormal": "/old/bad", "masks": "/old/masks", "table": "/old/t.csv"}
    file = stored_config(tmp_path / "run")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"config": {"data": old}, "names": {}}))
    notes = [f"evaluated again from {tmp_path / 'run'}"]
    found = config_of(tmp_path / "out", {"notes": notes, "overrides": [*overrides, "data.table=t.csv"]})
    new = {"normal": str(tmp_path / "new, (1)"), "abnormal": [str(tmp_path / "é b"), "/c"], "masks": None}
    assert found["data"] == old | new


def test_thumbnails_outline_the_true_defects(write, tmp_path):
    """The green line surrounds the mask that lies on disk, and a good image has none."""
    bottle = make_mvtec(tmp_path / "data", good=4, defects={"broken": 5})
    for file in (bottle / "test").rglob("*.png"):
        Image.new("RGB", (32, 32), (120, 120, 120)).save(file)
    write("a", maps=True, root=tmp_path / "data")
    (table,) = tables(write)
    cases = worst_cases("bottle", table.rows, 99, 10**9)
    assert sorted(case.label for case in cases) == [0] * 4 + [1] * 5
    for case in cases:
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(case.picture.partition(",")[2])))).astype(int)
        green = picture[..., 1] - picture[..., [0, 2]].max(-1) > 90
        assert green.any() == bool(case.label)
        if case.label:
            mask = Image.open(bottle / "ground_truth" / "broken" / f"{Path(case.path).stem}_mask.png")
            inside = np.array(mask.resize((128, 128), Image.Resampling.NEAREST)) > 0
            near = cv2.dilate(inside.astype(np.uint8), np.ones((13, 13))) > 0
            assert not (green & (inside | ~near)).any()
            assert cv2.connectedComponents((~green).astype(np.uint8), connectivity=4)[0] == 3  # a closed line


def test_decisions_at_a_negative_threshold(write):
    write("a", maps=True, thresholds__per_category={"bottle": {"image": -0.4, "pixel": 1.0, "background": 0.0}})
    (table,) = tables(write)
    scores, wrong = table.runs[0].scores["bottle"], 0
    score_of = dict(zip(scores.paths, scores.scores, strict=True))
    for case in worst_cases("bottle", table.rows, 99, 10**9):
        ((_, text, is_wrong),) = case.maps
        assert text == score_text(score_of[case.path], -0.4)
        assert is_wrong == ((score_of[case.path] > -0.4) != case.label)
        wrong += is_wrong
    assert to_html([table], "image_auroc").count('<span class="wrong">') == wrong > 0


def test_head_and_tail_means_with_intervals(write):
    names = ("bottle", "cable", "screw")
    long_tail = {"name": "exp100", "profile": "exp", "imbalance": 100, "order": "size", "seed": 0}
    long_tail |= {"head": ["cable", "screw"], "tail": ["bottle"]}
    for method in ("a", "b"):
        for seed in (0, 1):
            write(method, names, seed, split=long_tail)
    write("c", names, split=long_tail | {"name": "exp"})  # the same split, written split=exp split.imbalance=100
    write("a", names, split=long_tail | {"imbalance": 20})
    first, second = tables(write)
    assert (first.title, second.title) == ("folder data, split exp100", "folder data, split exp20")
    assert [row.label for row in first.rows] == ["a", "b", "c"]
    assert list(first.columns) == [*names, Over.HEAD, Over.TAIL, Over.MEAN]
    for row in first.rows:
        for metric in ("image_auroc", "pixel_ap"):
            for over, members in ((Over.HEAD, ["cable", "screw"]), (Over.TAIL, ["bottle"])):
                cell, of = first.cells(row, metric)[over], [values_by_seed(row, name, metric) for name in members]
                assert cell.mean == pytest.approx(np.mean(of))
                assert cell.sd == (pytest.approx(np.std(np.mean(of, 0), ddof=1)) if len(of[0]) > 1 else None)
    row = first.rows[0]
    each = [first.draws(row, c, "image_auroc") for c in ("cable", "screw")]
    draws = np.mean([one for one in each if one is not None], axis=0)
    assert first.cells(row, "image_auroc")[Over.HEAD].interval == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    out = compare(write.root, "--csv", write.root / "all.csv", "--html", write.root / "page.html")
    assert re.search(r"screw +head +tail +mean", out.out)
    assert "head: cable, screw" in out.out
    rows = list(csv.DictReader((write.root / "all.csv").read_text().splitlines()))
    assert {row["category"]: row["group"] for row in rows} == {"bottle": "tail", "cable": "head", "screw": "head"}
    assert '<button type="button">tail</button>' in (write.root / "page.html").read_text()


def test_intervals_come_from_the_scores_of_the_result(write):
    folder = write("a", quality=1)
    (table,) = tables(write)
    assert table.cells(table.rows[0], "image_auroc")["bottle"].interval
    (folder / "scores.csv").write_text((write("b", quality=-3) / "scores.csv").read_text())
    (table,) = tables(write)
    assert [table.cells(row, "image_auroc")["bottle"].interval is None for row in table.rows] == [True, False]
    assert "gives another image_auroc" in table.runs[0].problems[0]


def test_captions_and_plots_name_what_is_shown(write, tmp_path, monkeypatch):
    """No plot mixes intervals and deviations, and no caption names intervals that no cell has."""
    for method in "ab":
        for seed in (0, 1):
            write(method, seed=seed)
    for number in (0, 1):
        (write.root / f"run000{number}" / "scores.csv").unlink()
    (table,) = tables(write)
    bars = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, *_, **line: bars.append(x) if len(line) > 2 else 0)
    plot_metric(tmp_path / "plot.png", table, "image_auroc")
    assert bars[0][0] == bars[0][1]
    assert bars[1] == [100 * end for end in table.cells(table.rows[1], "image_auroc")["bottle"].interval or ()]
    assert "bootstrap" in caption(table, "image_auroc")
    for number in (2, 3):
        (write.root / f"run000{number}" / "scores.csv").unlink()
    (table,) = tables(write)
    assert "bootstrap" not in caption(table, "image_auroc")


def test_the_same_seed_twice_counts_once(write):
    write(timing__date="2026-01-01T00:00:00", per_category={"bottle": {"image_auroc": 0.25}})
    write(timing__date="2026-01-02T00:00:00", per_category={"bottle": {"image_auroc": 0.75}})
    (table,) = tables(write)
    assert table.cells(table.rows[0], "image_auroc")["bottle"].mean == 0.75
    assert any("run0000" in note for note in table.notes)
