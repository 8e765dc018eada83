"""Comparison of runs: statistics against SciPy, scikit-learn and plain loops; tables, files and the page from runs that
are copies of a real one with other numbers."""

import copy
import csv
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import wilcoxon
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_lite import comparison, formats, grouping, runset, statistics
from anomalib_lite.metrics.functional import image_curves, image_metrics
from tests.runs import Outcome, folder_data, python, result_of, run
from tests.trees import make_mvtec

ODD = '<script>alert("x")</script> & co_%'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def compare(*arguments: str | Path) -> Outcome:
    from anomalib_lite.compare import main

    return run(main, *arguments)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A run as the program leaves it."""
    folder = tmp_path_factory.mktemp("real")
    make_mvtec(folder / "data", good=4, defects={"broken": 5})
    result_of(*folder_data(folder / "data"), "method=norm_occ_closed_form", run_dir=folder / "run")
    return folder / "run"


class Writer:
    """Writes runs in the format of a real one."""

    def __init__(self, real: Path, root: Path) -> None:
        self.root, self.count = root, 0
        self.result = json.loads((real / "result.json").read_text())
        self.config = json.loads((real / "checkpoints" / "config.json").read_text())
        with np.load(real / "maps.npz") as file:
            self.maps, self.scale = file["maps"], file["scale"]
        with (real / "scores.csv").open() as file:
            self.rows = list(csv.reader(file))

    def __call__(
        self, method="a", categories=("bottle",), seed=0, quality=1.0, config=None, maps=False, **changes: Any
    ) -> Path:
        """A run; `changes` replace what result.json holds, `a__b` its key b in a."""
        folder = self.root / f"run{self.count:04}"
        (folder / "checkpoints").mkdir(parents=True)
        self.count += 1
        result, rng = copy.deepcopy(self.result), np.random.default_rng(self.count)
        rows, curves = [self.rows[0]], {}
        result |= {"method": method, "seed": seed, "categories": list(categories), "per_category": {}}
        result["setting"] = "single" if len(categories) == 1 else "unified"
        for category in categories:
            labels = np.array([int(row[3]) for row in self.rows[1:]])
            scores = rng.normal(quality * labels)
            for row, score in zip(self.rows[1:], scores, strict=True):
                path = row[0].replace("bottle", category, 1)
                rows.append([path, category, row[2], row[3], repr(float(score))])
            pixel = {key: float(rng.uniform()) for key in self.result["metrics"] if not key.startswith("image")}
            result["per_category"][category] = image_metrics(scores, labels) | pixel
            curves |= {f"{category}/{key}": value for key, value in image_curves(scores, labels).items()}
        for part in ("train_counts", "test_counts"):
            result["data"][part] = dict.fromkeys(categories, self.result["data"][part]["bottle"])
        limits = self.result["thresholds"]["per_category"]["bottle"]
        result["thresholds"]["per_category"] = dict.fromkeys(categories, limits)
        result["data"]["fingerprint"] = "+".join(categories)
        for key, value in changes.items():
            *groups, last = key.split("__")
            inner = result
            for group in groups:
                inner = inner[group]
            inner[last] = value
        (folder / "result.json").write_text(json.dumps(result))
        stored = copy.deepcopy(self.config)
        stored["config"]["seed"] = seed
        stored["config"]["method"] |= config or {}
        (folder / "checkpoints" / "config.json").write_text(json.dumps(stored))
        with (folder / "scores.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        if maps:
            stack = np.concatenate([self.maps] * len(categories))
            paths = np.array([row[0] for row in rows[1:]])
            np.savez_compressed(folder / "maps.npz", maps=stack, scale=self.scale, paths=paths, **curves)  # type: ignore[arg-type]
        return folder


@pytest.fixture
def write(real, tmp_path) -> Writer:
    return Writer(real, tmp_path / "runs")


def tables(write: Writer) -> list[comparison.Table]:
    runs, left_out = runset.read([write.root])
    assert not left_out
    return grouping.tables(runs, [])


# statistics


def plain_auroc(labels, scores) -> float:
    pairs = [(x > y) + 0.5 * (x == y) for x in scores[labels == 1] for y in scores[labels == 0]]
    return float(np.mean(pairs))


def plain_f1max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


PLAIN = {
    "image_auroc": [plain_auroc, roc_auc_score],
    "image_ap": [average_precision_score],
    "image_f1max": [plain_f1max],
}


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
        for plain in PLAIN[metric]:
            assert draws == pytest.approx(np.mean([plain(labels[rows], one[rows]) for one in scores]), abs=1e-12)


def test_interval_against_a_plain_loop():
    rng = np.random.default_rng(2)
    labels = np.array([1] * 40 + [0] * 30)
    scores = rng.normal(labels)
    found = statistics.interval(statistics.auroc_draws(statistics.resamples(labels), labels, scores[None]))
    loop = []
    for _ in range(2000):
        bad, good = rng.choice(scores[:40], 40), rng.choice(scores[40:], 30)
        loop.append(np.mean(bad[:, None] > good))
    assert found == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])), abs=0.012)
    assert found == statistics.interval(
        statistics.auroc_draws(statistics.resamples(labels), labels, scores[None])
    )  # seeded


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


def test_disagreement():
    labels, scores = np.array([1, 0, 1, 0, 0]), np.array([0.1, 0.9, 0.8, 0.2, 0.2])
    assert statistics.disagreement(labels, scores).tolist() == [1, 1, 0.25, 0.375, 0.375]


# tables


def test_seeds_are_averaged_and_other_keys_are_not(write):
    for norm in (0.1, 10):
        for seed in (0, 1, 2):
            for category in ("bottle", "cable"):
                write("norm_occ", (category,), seed, config={"norm": norm, "target": "point"})
    (table,) = tables(write)
    assert [row.label for row in table.rows] == ["norm_occ (norm=0.1)", "norm_occ (norm=10)"]
    for row in table.rows:
        values = {
            c: [
                json.loads((run.folder / "result.json").read_text())["per_category"][c]["pixel_ap"]
                for run in of.values()
            ]
            for c, of in row.runs.items()
        }
        cells = table.cells(row, "pixel_ap")
        for category in ("bottle", "cable"):
            assert cells[category].mean == pytest.approx(np.mean(values[category]))
            assert cells[category].sd == pytest.approx(np.std(values[category], ddof=1))
            assert cells[category].seeds == 3
        by_seed = np.mean([values["bottle"], values["cable"]], 0)
        assert cells[None].mean == pytest.approx(by_seed.mean())
        assert cells[None].sd == pytest.approx(by_seed.std(ddof=1))


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
    assert any("protocol.scoring.pixel_smooth differs" in note for note in table.notes)


def test_ties_within_rounding_are_all_best(write):
    for method, value in (("a", 0.9811), ("b", 0.9812), ("c", 0.9799)):
        write(method, per_category={"bottle": {"image_auroc": value}})
    (table,) = tables(write)
    marked = [cells["bottle"].best for _, cells in table.body("image_auroc")["single"]]
    assert marked == [True, True, False]


def test_missing_categories_and_null_metrics(write):
    write("a", ("bottle",))
    write("a", ("cable",))
    write("b", ("bottle",))
    write("c", ("bottle",), per_category={"bottle": {"image_auroc": None, "image_ap": 0.5}})
    write("c", ("cable",))
    (table,) = tables(write)
    cells = {row.label: table.cells(row, "image_auroc") for row in table.rows}
    assert {label: None in of for label, of in cells.items()} == {"a": True, "b": False, "c": False}
    assert table.missing("image_auroc") == [
        "without image_auroc of cable, so no mean: b",
        "without image_auroc of bottle, so no mean: c",
    ]
    outcome = compare(write.root)
    assert outcome.code == 0
    assert "development data: bottle" in outcome.out
    assert "–" in outcome.out


def test_paired_tests(write):
    names = [f"k{i}" for i in range(6)]
    for i, name in enumerate(names):
        for method, value in (("a", 0.9 - 0.01 * i), ("b", 0.8 - 0.013 * i), ("c", 0.5 + 0.1 * (i % 2))):
            for seed in (0, 1):
                write(method, (name,), seed, per_category={name: {"image_auroc": value + 0.001 * seed}})
    (table,) = tables(write)
    tests, told = table.tests("image_auroc")
    raw = {}
    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        x, y = ([table.means(row, "image_auroc")[n] for n in names] for row in table.rows if row.label in (a, b))
        raw[a, b] = wilcoxon(np.round(np.subtract(x, y), 12)).pvalue
    expected = dict(zip(raw, statistics.holm(list(raw.values())), strict=True))
    assert {(a, b): p for a, b, _, p, n in tests if n == 6} == pytest.approx(expected)
    assert "3 pairs" in told
    shutil.rmtree(write.root / "run0000")
    shutil.rmtree(write.root / "run0001")  # a has five categories now
    assert len(tables(write)[0].tests("image_auroc")[0]) == 1


def test_fewer_than_six_categories_are_not_tested(write):
    for name in "vwxyz":
        write("a", (name,))
        write("b", (name,))
    assert tables(write)[0].tests("image_auroc") == ([], "no paired tests: fewer than 6 categories in common")


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
    assert "split.name differs" in found[3].notes[0]
    assert not any("does not compare" in note for note in found[4].notes)
    outcome = compare(write.root)
    assert outcome.code == 0
    assert "table 2: " in outcome.out
    assert "run0001" in outcome.out


def test_unified_and_single_are_row_groups(write):
    write("a", ("bottle", "cable"), groups={"head": {"image_auroc": 0.75}, "tail": {"image_auroc": 0.5}})
    write("a", ("bottle",))
    write("a", ("cable",))
    (table,) = tables(write)
    assert list(table.settings) == ["single", "unified"]
    ((row, cells),) = table.groups("image_auroc")
    assert (row.setting, cells["head"].mean, cells["tail"].mean) == ("unified", 0.75, 0.5)


def test_the_same_seed_twice_counts_once(write):
    write(timing__date="2026-01-01T00:00:00", per_category={"bottle": {"image_auroc": 0.25}})
    write(timing__date="2026-01-02T00:00:00", per_category={"bottle": {"image_auroc": 0.75}})
    (table,) = tables(write)
    assert table.cells(table.rows[0], "image_auroc")["bottle"].mean == 0.75
    assert any("run0000" in note for note in table.notes)


# files


def test_damaged_and_foreign_files_are_named_and_left_out(write, tmp_path):
    write("a")
    result = json.loads((write.root / "run0000" / "result.json").read_text())
    wrong = {
        "empty": "",
        "cut": json.dumps(result)[:200],
        "foreign": '{"accuracy": 1}',
        "list": "[]",
        "deep": "[" * 100_000,
        "version": json.dumps(result | {"schema": 99}),
        "nan": json.dumps(result | {"per_category": {"bottle": {"image_auroc": float("nan")}}}),
        "text": json.dumps(result | {"per_category": {"bottle": {"image_auroc": "high"}}}),
        "protocol": json.dumps(result | {"protocol": None}),
        "surrogate": json.dumps(result | {"method": "\udcff"}),
        "categories": json.dumps(result | {"categories": ["bottle", "cable"]}),
    }
    for name, text in wrong.items():
        (write.root / name).mkdir()
        (write.root / name / "result.json").write_text(text)
    (write.root / "binary").mkdir()
    (write.root / "binary" / "result.json").write_bytes(b"\xff\xfe\x00")
    (write("b") / "scores.csv").write_text("path,category,defect,label,score\nx.png,bottle,good,0\n")
    (write("c", maps=True) / "maps.npz").write_bytes(b"PK nothing")
    (write("d") / "checkpoints" / "config.json").write_text("{")
    outcome = compare(write.root, "--html", tmp_path / "page.html", "--plots", tmp_path / "plots")
    assert outcome.code == 0, outcome.err
    for name in (*wrong, "binary", "run0001/scores.csv", "run0002/maps.npz"):
        assert len([line for line in outcome.err.splitlines() if f"/{name}" in line]) == 1, name
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: DIR; see --help"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no readable result.json below"),
        (["runs", "--metric", "beauty"], "--metric beauty: the runs have image_auroc"),
        (["runs", "--html"], "argument --html: expected one argument; see --help"),
        (["runs", "--csv", "taken/file.csv"], "taken/file.csv: "),
        (["runs", "--plots", "taken"], "--plots taken: "),
    ],
)
def test_bad_input_is_one_line(arguments, told, write, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    if "runs" in arguments:
        write()
    monkeypatch.chdir(tmp_path)
    outcome = compare(*arguments)
    assert outcome.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err)
    assert told in outcome.err


def test_it_imports_no_torch_and_explains_itself():
    done = python("-c", "import sys, anomalib_lite.compare; print('torch' in sys.modules)")
    assert done.out == "False\n"
    shown = compare("--help")
    assert shown.code == 0
    assert "--markdown FILE" in shown.out


def test_csv_holds_all_digits(write):
    for method in ("a", ODD):
        write(method, ("bottle", "a,b"))
    runs, _ = runset.read([write.root])
    rows = list(csv.DictReader(io.StringIO(formats.to_csv(grouping.tables(runs, []), runs))))
    assert [(row["method"], row["category"]) for row in rows] == [
        ("a", "bottle"), ("a", "a,b"), (ODD, "bottle"), (ODD, "a,b"),
    ]  # fmt: skip
    for row in rows:
        stored = json.loads((Path(row["run"]) / "result.json").read_text())
        for key, value in stored["per_category"][row["category"]].items():
            assert float(row[key]) == value
        assert float(row["fit (s)"]) == stored["timing"]["fit_s"]


def test_latex_and_markdown(write):
    for seed in (0, 1):
        for name in ("bottle", "a_b & c|d"):
            write("a", (name,), seed, quality=5)
            write(ODD, (name,), seed, quality=0)
    found = tables(write)
    text = formats.to_latex(found, "image_auroc")
    assert text.count(r"\begin{tabular}{lrrrr}") == text.count(r"\end{tabular}") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)
    assert r"a\_b \& c\textbar{}d" in rows[0]
    assert any(re.search(r"\\textbf\{\d+\.\d\} \$\\pm\$ \d", row) for row in rows)
    assert "<" not in text.partition(r"\begin{tabular}")[2].partition(r"\end{tabular}")[0]
    shown = formats.to_markdown(found, "image_auroc")
    assert "<script" not in shown
    head = next(line for line in shown.splitlines() if line.startswith("| method"))
    assert len(re.findall(r"(?<!\\)\|", head)) == 6
    assert re.search(r"\*\*\d+\.\d ± \d\.\d\*\* \[\d", shown)


def test_a_thousand_runs_take_seconds(write):
    for i in range(20):
        write(f"m{i}", (f"k{i % 10}",))
    original = [write.root / f"run{i:04}" for i in range(20)]
    for i in range(20, 1000):  # 20 methods, 10 categories, 5 seeds
        folder = shutil.copytree(original[i % 20], write.root / f"run{i:04}")
        text = (folder / "result.json").read_text()
        category, method, seed = i % 10, i // 10 % 20, i // 200
        result = json.loads(text.replace(f'"k{i % 10}', f'"k{category}'))
        result |= {"method": f"m{method}", "seed": seed}
        (folder / "result.json").write_text(json.dumps(result))
    started = time.perf_counter()
    outcome = compare(write.root, "--csv", write.root / "all.csv", "--html", write.root / "page.html")
    took = time.perf_counter() - started
    assert outcome.code == 0, outcome.err
    assert "190 pairs" in outcome.out
    assert took < 20, f"{took:.1f} s"
    assert (write.root / "page.html").stat().st_size < 10e6


# the page


class Names(HTMLParser):
    """Scripts, addresses that a page would load, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.sources, self.text, self.cells = 0, [], "", 0  # type: ignore[var-annotated]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(write, tmp_path) -> Path:
    for seed in (0, 1):
        for category in ("bottle", ODD):
            write("weak", (category,), seed, quality=0.2, maps=True)
            write("strong", (category,), seed, quality=3, maps=True)
            write(ODD, (category,), seed, quality=1, maps=True)
    outcome = compare(write.root, "--html", tmp_path / "deep" / "page.html", "--plots", tmp_path / "plots")
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "plots").glob("*.png"))) == 8 + 2
    return tmp_path / "deep" / "page.html"


def test_names_are_escaped_and_nothing_is_loaded(page):
    text = page.read_text()
    names = Names(text)
    assert names.scripts == 1
    assert ODD in names.text
    assert names.sources
    assert all(source.startswith("data:image/") for source in names.sources)
    assert any(source.startswith("data:image/jpeg") for source in names.sources)  # the images are still there
    assert not re.search(
        r"(?:https?:)?//(?!www\.w3\.org)[a-z]", re.sub(r"data:[^\"]*", "", text).partition("<script>")[0]
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_the_page_in_a_browser(page, tmp_path):
    def body(fragment: str) -> str:
        done = subprocess.run(
            [
                str(CHROMIUM),
                *OFFLINE,
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                f"{page.as_uri()}#{fragment}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def order(dom: str, metric: str) -> list[str]:
        table = dom.partition(f'id="t1-{metric}"')[2].partition("</table>")[0]
        return re.findall(r'<td class="name" data-v="([^"<&]*)', table)

    assert order(body("sort=t1-image_auroc:1:desc"), "image_auroc")[0] == "strong"
    assert order(body("sort=t1-image_auroc:1:asc"), "image_auroc")[-1] == "strong"
    dom = body("metric=pixel_ap&sort=t1-pixel_ap:0:desc")
    assert order(dom, "pixel_ap")[:2] == ["weak", "strong"]
    assert re.search(r'<div data-metric="image_auroc" hidden', dom)
    assert re.search(r'<div data-metric="pixel_ap">', dom)
