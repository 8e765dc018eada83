"""Few shots in comparisons: which runs share a table, what is averaged, and the curve, against NumPy on the results."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from anomalib_lite.comparison.export import notes, render
from anomalib_lite.comparison.page import to_html
from anomalib_lite.comparison.plots import plot_shots
from anomalib_lite.comparison.tables import Over
from tests.helpers.written_runs import compare, tables

NAMES = ("bottle", "cable")


def few(write, method, shots, drawn=0, seed=0, names=NAMES, of=None, **more):
    """A run with few shots, drawn with the seed `drawn` from the data set `of`."""
    split = {"name": "shots", "profile": "shots", "shots": shots, "seed": drawn, "head": [], "tail": []}
    hashes = {"data__fingerprint": f"{shots}, {drawn}", "data__full_fingerprint": of or "+".join(names)}
    return write(method, names, seed, split=split, **hashes, **more)


def stored(folders, metric) -> np.ndarray:
    """The metric of runs and categories."""
    results = [json.loads((folder / "result.json").read_text())["per_category"] for folder in folders]
    return np.array([[result[name][metric] for name in result] for result in results])


@pytest.fixture
def runs(write):
    """The folders of runs by method and number of shots: three draws each, and one run with all images."""
    found: dict[tuple[str, int | None], list[Path]] = {}
    for method in ("a", "b"):
        for shots in (8, 1, 2):
            found[method, shots] = [few(write, method, shots, drawn) for drawn in range(3)]
        found[method, None] = [write(method, NAMES)]
    return found


def test_shots_and_all_images_share_a_table_and_draws_are_averaged(write, runs):
    (table,) = tables(write)
    assert table.title == "folder data, 1 shot, 2 shots, 8 shots, all images"
    assert list(table.body("pixel_ap")) == [f"unified, {n}" for n in ("1 shot", "2 shots", "8 shots", "all images")]
    assert table.shots == [1, 2, 8, None]
    assert len(table.rows) == 8
    assert any(note.startswith("few shots: runs that differ in seed or split.seed") for note in table.notes)
    for metric in ("image_auroc", "pixel_ap"):
        lines = table.over_shots(metric)
        assert list(lines) == ["a", "b"]
        for row in table.rows:
            values = stored(runs[row.method, row.shots], metric)
            cells = table.cells(row, metric)
            for column, of in ((Over.MEAN, values.mean(1)), ("bottle", values[:, 0])):
                assert cells[column].mean == pytest.approx(of.mean())
                assert cells[column].sd == (pytest.approx(of.std(ddof=1)) if len(of) > 1 else None)
                assert cells[column].seeds == len(of)
            assert lines[row.line][row.shots] is cells[Over.MEAN]
        for shots in table.shots:  # the best of each number of shots
            means = [100 * stored(runs[method, shots], metric).mean() for method in "ab"]
            assert [lines[m][shots].best for m in "ab"] == [round(mean, 1) == round(max(means), 1) for mean in means]


def test_a_seed_and_a_draw_are_both_averaged(write):
    folders = [few(write, "a", 4, drawn, seed) for drawn in (0, 1) for seed in (0, 1, 2)]
    (table,) = tables(write)
    assert (table.title, table.shots) == ("folder data, 4 shots", [])
    (row,) = table.rows
    assert (row.group, row.full_label) == ("unified", "a")
    means = stored(folders, "pixel_ap").mean(1)
    cell = table.cells(row, "pixel_ap")[Over.MEAN]
    assert (cell.mean, cell.sd, cell.seeds) == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1)), 6)
    few(write, "a", 4, 1, 2, timing__date="2999-01-01T00:00:00")
    (table,) = tables(write)
    assert any("run again with the same seed" in note for note in table.notes)


def test_what_few_shots_are_not_mixed_with(write):
    few(write, "a", 4)
    few(write, "a", 4, of="another version of the data")
    write("a", NAMES, split={"name": "exp", "profile": "exp", "imbalance": 20, "order": "size", "seed": 0})
    few(write, "a", 4, names=("bottle",))  # a model of one category is another setting
    found = tables(write)
    assert [[row.setting for row in table.rows] for table in found] == [["single", "unified"], ["unified"], ["unified"]]
    assert "data.fingerprint differs" in found[1].notes[0]
    assert any("split.profile differs" in note for note in found[2].notes)


def test_what_differs_between_shots_is_named(write):
    few(write, "a", 4, config={"norm": 1})
    few(write, "a", 8, config={"norm": 2})
    turned = {"augment": [{"_target_": "anomalib_lite.data.transforms.Turn", "step": 45}]}
    path = few(write, "b", 8) / "checkpoints" / "config.json"
    few(write, "b", 8)
    config = json.loads(path.read_text())
    config["config"]["data"] |= turned
    path.write_text(json.dumps(config))
    (table,) = tables(write)
    labels = ["a (norm=1) [unified, 4 shots]", "a (norm=2) [unified, 8 shots]"]
    labels += [f"b (augment={of}) [unified, 8 shots]" for of in ("Turn", "null")]
    assert [row.full_label for row in table.rows] == labels
    assert list(table.over_shots("image_auroc")) == [label.partition(" [")[0] for label in labels]


def test_every_format_has_methods_over_shots(write, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: Path(file).touch())
    few(write, "odd_name", 2)
    out = compare(write.root, "--csv", tmp_path / "all.csv", "--plots", tmp_path / "plots", "--metric", "pixel_ap")
    assert out.code == 0, out.err
    (table,) = tables(write)
    texts = {}
    for method in ("a", "b", "odd_name"):
        means = [stored(runs[method, n], "pixel_ap").mean(1) if (method, n) in runs else [] for n in table.shots]
        texts[method] = [f"{100 * np.mean(of):.1f}" if len(of) else "–" for of in means]
    texts["odd_name"][1] = f"{100 * table.over_shots('pixel_ap')['odd_name'][2].mean:.1f}"
    markdown, latex = (render(f"table.{kind}", [table], "pixel_ap") for kind in ("md", "tex"))
    blocks = {
        "terminal": out.out.partition("few shots, mean")[2],
        "markdown": markdown.replace("*", "").replace("\\_", "_").partition("| few shots, mean |")[2],
        "latex": re.sub(r"\\textbf{(.*?)}", r"\1", latex).replace("\\_", "_").partition("few shots, mean &")[2],
        "html": to_html([table], "pixel_ap").partition("t1-shots-pixel_ap")[2].partition("</table>")[0],
    }
    rows_of_page = blocks["html"].replace("<wbr>", "").replace("\n", " ").replace("<tr>", "\n")
    blocks["html"] = re.sub(r"<[^>]+>", " ", rows_of_page)
    for kind, block in blocks.items():
        for method, numbers in texts.items():
            line = next(line for line in block.splitlines() if re.match(rf"\W*{method}\b", line))
            words = re.sub(r"(±|\$\\pm\$) +\S+|\*", "", line).replace("--", "–").split()
            assert [word for word in words if re.fullmatch(r"\d+\.\d|–", word)] == numbers, (kind, line)
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    counts = {(row["method"], row["shots"], row["split.seed"]) for row in rows}
    assert {("a", "8", "2"), ("b", "1", "0"), ("odd_name", "2", "0")} < counts
    assert {row["shots"] for row in rows if row["split"] == "full"} == {""}
    assert (tmp_path / "plots" / "shots_pixel_ap.png").is_file()
    assert "no paired tests" in " ".join(notes(table, "pixel_ap"))


def test_the_curve(write, runs, tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    (table,) = tables(write)
    plot_shots(tmp_path / "x.png", table, "pixel_ap")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "8", "all"]
    assert axis.get_xticks().tolist() == [1, 2, 8, 16]
    assert [container.get_label() for container in axis.containers] == ["a", "b"]
    for container in axis.containers:
        line, _, (bars,) = container
        for x, y, bar, shots in zip(*line.get_data(), bars.get_segments(), table.shots, strict=True):
            means = 100 * stored(runs[container.get_label(), shots], "pixel_ap").mean(1)
            sd = means.std(ddof=1) if len(means) > 1 else 0
            assert y == pytest.approx(means.mean())
            assert bar[:, 1] == pytest.approx([means.mean() - sd, means.mean() + sd])
            assert x == pytest.approx(shots or 16, rel=0.05)
