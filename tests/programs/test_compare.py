"""The program that compares runs: what it reads, refuses and writes, and its page in a browser."""

import csv
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import anomalib_lite.compare
from anomalib_lite.comparison.export import render
from tests.helpers.run_programs import assert_refused, python, succeeded
from tests.helpers.written_runs import ODD, compare, sample_runs, tables
from tests.programs.test_printing import closed_pipe, run_on

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


# files


def test_runs_without_a_result_are_named(write, tmp_path):
    write("a")
    (tmp_path / "runs" / "failed" / ".hydra").mkdir(parents=True)
    outcome = compare(tmp_path / "runs")
    assert outcome.code == 0
    assert f"{tmp_path / 'runs' / 'failed'}: without a result" in outcome.out + outcome.err


def test_links_are_followed_once(write, tmp_path):
    write("a")
    (tmp_path / "linked").symlink_to(write.root)
    (write.root / "circle").symlink_to(write.root)
    succeeded(compare(tmp_path / "linked", write.root, tmp_path, "--csv", tmp_path / "all.csv"))
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 2


def test_files_are_written_before_anything_is_printed(write, tmp_path):
    """Standard output and error belong to a reader that has gone away, as in `2>&1 | true`."""
    write("a")
    (write.root / "foreign").mkdir()
    (write.root / "foreign" / "result.json").write_text("{}")
    files = {name: tmp_path / "new" / "folder" / name for name in ("csv", "latex", "markdown", "html", "plots")}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    run_on(closed_pipe(), anomalib_lite.compare, write.root, *options)
    assert "</html>" in files["html"].read_text()
    assert all(file.read_text() for name, file in files.items() if name != "plots")
    assert (files["plots"] / "image_auroc.png").is_file()


def test_a_file_that_cant_be_written_keeps_no_other_back(write, tmp_path):
    write("a")
    (tmp_path / "taken").write_text("a file")
    wrong = ("--csv", tmp_path / "taken" / "all.csv", "--markdown", tmp_path)
    outcome = compare(write.root, *wrong, "--html", tmp_path / "page.html")
    assert outcome.code == 2
    assert re.fullmatch(r"error: --csv [^\n]+/all.csv: [^\n]+; --markdown [^\n]+; choose another path\n", outcome.err)
    assert "</html>" in (tmp_path / "page.html").read_text()


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
    write("e", data__test_counts=1, thresholds__per_category={"bottle": 1}, groups={"head": {"metrics": 1}, "tail": 2})
    outcome = succeeded(compare(write.root, "--html", tmp_path / "page.html", "--plots", tmp_path / "plots"))
    for name in (*wrong, "binary", "run0001/scores.csv", "run0002/maps.npz"):
        assert len([line for line in outcome.err.splitlines() if f"/{name}" in line]) == 1, name
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_bad_input_is_one_line(arguments, message, write, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    if "runs" in arguments:
        write()
    monkeypatch.chdir(tmp_path)
    assert_refused(compare(*arguments), re.escape(message))


def test_it_imports_no_torch_and_explains_itself():
    done = python("-c", "import sys, anomalib_lite.compare; print('torch' in sys.modules)")
    assert done.out == "False\n"
    shown = compare("--help")
    assert shown.code == 0
    assert "--markdown FILE" in shown.out


def test_csv_holds_all_digits(write):
    for method in ("a", ODD):
        write(method, ("bottle", "a,b"))
    assert compare(write.root, "--csv", write.root / "all.csv").code == 0
    rows = list(csv.DictReader((write.root / "all.csv").read_text().splitlines()))
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
    text = render("table.tex", found, "image_auroc")
    assert text.count(r"\begin{tabular}{lrrrr}") == text.count(r"\end{tabular}") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)
    assert r"a\_b \& c\textbar{}d" in rows[0]
    assert any(re.search(r"\\textbf\{\d+\.\d\} \$\\pm\$ \d", row) for row in rows)
    assert "<" not in text.partition(r"\begin{tabular}")[2].partition(r"\end{tabular}")[0]
    shown = render("table.md", found, "image_auroc")
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
    started = time.process_time()
    outcome = compare(write.root, "--csv", write.root / "all.csv", "--html", write.root / "page.html")
    took = time.process_time() - started
    assert outcome.code == 0, outcome.err
    assert "190 pairs" in outcome.out
    assert took < 15, f"{took:.1f} s of CPU time"  # about 5; more where cores are shared
    assert (write.root / "page.html").stat().st_size < 10e6


# the page


class Names(HTMLParser):
    """Scripts, addresses that a page would load, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.text, self.sources = 0, "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(write, tmp_path) -> Path:
    sample_runs(write)
    succeeded(compare(write.root, "--html", tmp_path / "deep" / "page.html", "--plots", tmp_path / "plots"))
    assert len(list((tmp_path / "plots").glob("*.png"))) == 11 + 2  # metrics, and curves
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
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(CHROMIUM), *OFFLINE, profile, "--dump-dom", f"{page.as_uri()}#{fragment}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def order(dom: str, metric: str) -> list[str]:
        table = dom.partition(f'id="t1-{metric}"')[2].partition("</table>")[0]
        return re.findall(r'<td class="name" data-v="([^"<&]*)', table)

    assert order(body("sort=t1-image_auroc:1:desc"), "image_auroc")[0] == "strong"
    assert order(body("sort=t1-image_auroc:1:asc"), "image_auroc")[-1] == "strong"
    dom = body("metric=pixel_ap&sort=t1-pixel_ap:0:desc")
    assert order(dom, "pixel_ap")[:2] == ["weak", "strong"]
    assert re.search(r'<div data-metric="image_auroc" hidden', dom)
    assert re.search(r'<div data-metric="pixel_ap">', dom)
