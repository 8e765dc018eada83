"""The reproduction board: published figures beside ours."""

import json
import re

import numpy as np
import pytest

from anomalib_lite.cli.program import composed
from anomalib_lite.comparison import published
from anomalib_lite.errors import UserError
from tests.helpers.run_programs import ROOT, succeeded
from tests.helpers.written_runs import Writer, compare, tables

ENTRY = """
published:
- method: a
  dataset: folder
  categories: 2
  values: {image_auroc: 90, pixel_auroc: 80}
  per_category: {image_auroc: {bottle: 95, tile: 85}}
  config: {data: {batch_size: 4}}
  source: "paper | of <somebody>"
  test_informed: the best epoch
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text(ENTRY)
    return path


def lines_of(write: Writer, file) -> dict[str, published.Line]:
    return {line.metric: line for line in published.board(published.read(file), tables(write))}


def test_all_categories_and_seeds(write, file):
    values: dict[str, list[float]] = {"image_auroc": [], "pixel_auroc": []}
    for seed in (0, 1, 2):
        for category in ("bottle", "tile"):
            run = write("a", (category,), seed, quality=1.0)
            for metric, found in values.items():
                found.append(published_value(run, category, metric))
    lines = lines_of(write, file)
    for metric, found in values.items():
        means = 100 * np.array(found).reshape(3, 2).mean(1)  # of each seed over categories
        line = lines[metric]
        assert line.ours == pytest.approx(means.mean(), abs=1e-9)
        assert line.sd == pytest.approx(means.std(ddof=1), abs=1e-9)
        assert (line.seeds, line.published) == (3, {"image_auroc": 90, "pixel_auroc": 80}[metric])
        assert not line.differs
        assert line.texts()[6] == f"{means.mean() - line.published:+.1f}"


def published_value(run, category, metric):
    return json.loads((run / "result.json").read_text())["per_category"][category][metric]


def test_a_part_of_the_categories(write, file):
    """Where the figure of the same categories is known, that one is compared; otherwise there is no difference."""
    write("a", ("tile",), environment__git="f" * 40 + "+changes")
    lines = lines_of(write, file)
    assert lines["image_auroc"].remarks[-1].endswith("commit ffffffff+changes")
    assert lines["image_auroc"].published == 85
    assert lines["pixel_auroc"].published is None
    assert lines["pixel_auroc"].texts()[6] == "–"
    assert lines["image_auroc"].differs
    assert "1 of 2 categories (tile)" in lines["image_auroc"].texts()[7]


def test_categories_with_other_seeds(write, file):
    """The mean over categories, as in the tables, without a deviation; also where some seeds are common."""
    bottle, *tiles = (
        published_value(write("a", (category,), seed), category, "image_auroc")
        for category, seed in (("bottle", 0), ("tile", 0), ("tile", 1))
    )
    line = lines_of(write, file)["image_auroc"]
    assert line.ours == pytest.approx(100 * np.mean([bottle, np.mean(tiles)]))
    assert (line.seeds, line.sd, line.differs) == (1, None, False)


def test_what_was_not_run_and_what_differs(write, file):
    of_study = ENTRY.replace("  source", "  experiment: unknown\n  source")
    write("b")
    file.write_text(of_study)
    line = lines_of(write, file)["image_auroc"]
    assert line.texts()[5:8] == ["not run", "–", "+experiments=unknown"]
    write("a")
    with pytest.raises(UserError, match=r"\+experiments=unknown of a: .*; correct the entry"):
        lines_of(write, file)
    file.write_text(ENTRY.replace("batch_size: 4", "batch_size: 16"))
    assert "data.batch_size=4, published 16" in lines_of(write, file)["image_auroc"].remarks


def test_settings_other_than_those_of_the_study(write, file):
    """The budget, the weights, an option that the study lacks, another smoothing, held-out images; not the hardware."""
    file.write_text(ENTRY.replace("config: {data: {batch_size: 4}}", "experiment: recontrast_mvtec"))
    changed = {
        "trainer.max_epochs": "1", "backbone.weights": "none", "+method.scheduler.step": "3",
        "scoring.pixel_smooth": "{sigma:3}", "data.val_fraction": "0.1",
    }  # fmt: skip
    more = [f"{key}={value}" for key, value in changed.items()]
    for overrides in ([], ["hardware.devices=2", "data.workers=3", "seed=5"], more):
        config = write("a", ("bottle", "tile")) / "checkpoints" / "config.json"
        stored = json.loads(config.read_text())
        stored["config"], _ = composed(["+experiments=recontrast_mvtec", "data.category=[bottle,tile]", *overrides])
        config.write_text(json.dumps(stored))
    [entry], [table] = published.read(file), tables(write)
    lines = published.board([entry.model_copy(update={"setting": "unified"})], [table])
    of_image = [line for line in lines if line.metric == "image_auroc"]
    assert [line.differs for line in of_image].count(False) == 1
    other = next(line.remarks[0] for line in of_image if line.differs)
    found = [text.partition(", published ")[0] for text in re.split(r", (?=\w+\.)", other)]
    assert sorted(found) == [
        "backbone.weights=none", "data.val_fraction=0.1", "method.scheduler.step=3", "scoring.pixel_smooth.sigma=3",
        "scoring.pixel_smooth=None", "trainer.max_epochs=1",
    ]  # fmt: skip


def test_categories_with_maps_of_other_sizes_are_one_line(write, file):
    """Textures are evaluated at their own size, in a table of their own; another run of bottle is another line."""
    bottle = published_value(write("a", ("bottle",)), "bottle", "image_auroc")
    tile = published_value(write("a", ("tile",), protocol__data__map_size="original"), "tile", "image_auroc")
    line = lines_of(write, file)["image_auroc"]
    assert line.ours == pytest.approx(50 * (bottle + tile))
    assert (line.published, line.differs) == (90, False)
    write("a", ("bottle",), protocol__data__map_size=[9, 9])
    assert len(published.board(published.read(file), tables(write))) == 4


def test_other_images_than_the_official_ones(write, file):
    file.write_text(ENTRY.replace("dataset: folder", "dataset: mvtec"))
    official = {"data__test_counts": {"cable": {"good": 58, "defective": 92}}, "split__full_counts": {"cable": 224}}
    write("a", ("bottle",), dataset="mvtec")
    write("a", ("cable",), dataset="mvtec", **official)
    remarks = lines_of(write, file)["image_auroc"].remarks
    assert remarks[0] == "bottle has 6 + 4 + 5 images, officially 209 + 20 + 63"
    assert len(remarks) == 2


def test_a_long_tail_is_known_by_its_profile_and_imbalance(write, file):
    """Whatever its name in the run; another order of the classes is a difference."""
    entry = ENTRY.replace("  categories: 2", "  split: exp100\n  categories: 2")
    file.write_text(entry.replace("config: {", "config: {split: {order: size}, "))
    for name, imbalance, order in (("exp", 100, "size"), ("exp100", 100.0, "reverse"), ("exp100", 20, "size")):
        split = {"name": name, "profile": "exp", "imbalance": imbalance, "order": order, "seed": 0}
        config = write("a", split=split) / "checkpoints" / "config.json"
        stored = json.loads(config.read_text())
        stored["config"]["split"] = split
        config.write_text(json.dumps(stored))
    lines = [line for line in published.board(published.read(file), tables(write)) if line.metric == "image_auroc"]
    assert [line.remarks[1:-1] for line in lines] == [[], ["split.order=reverse, published size"]]


def test_files(write, file, tmp_path):
    write("a")
    pages = [tmp_path / name for name in ("board.md", "board.html")]
    outcome = succeeded(compare(write.root, "--published", file, "--markdown", pages[0], "--html", pages[1]))
    assert "published figures and ours" in outcome.out
    assert r"paper \| of &lt;somebody&gt;; test-informed: the best epoch" in pages[0].read_text()
    assert "paper | of &lt;somebody&gt;" in pages[1].read_text()


def test_without_runs(file, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = succeeded(compare(tmp_path / "empty", "--published", file, "--html", tmp_path / "page.html"))
    assert "not run" in outcome.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "published.yaml: .*; give a file"),
        ("a: 1", "`published` is no list of settings"),
        (ENTRY.replace("source", "sources"), "entry 1, source.*: .*; correct this field"),
        (ENTRY.replace("categories: 2", "categories: two"), "entry 1, categories: .*; correct this field"),
    ],
)
def test_a_wrong_file(file, text, expected):
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        published.read(file)
    assert "\n" not in str(error.value)


def test_our_own_file():
    """Every entry names a method that exists, and settings: an experiment of this method, or its own."""
    entries = published.read(ROOT / "experiments" / "published.yaml")
    for entry in entries:
        assert (ROOT / "conf" / "method" / f"{entry.method}.yaml").is_file()
        assert entry.experiment or entry.config
        assert all(re.fullmatch(r"(image|pixel)_\w+|aupro_\d+", metric) for metric in entry.values)
        for values in entry.per_category.values():
            assert len(values) == entry.categories
    for entry in {(e.experiment, e.method, *e.overrides): e for e in entries if e.experiment}.values():
        config, _ = composed([f"+experiments={entry.experiment}", *entry.overrides, "data.category=all"])
        methods = {path.stem: path for path in (ROOT / "conf" / "method").glob("*.yaml")}
        assert config["data"]["name"] == entry.dataset
        assert f"_target_: {config['method']['_target_']}\n" in methods[entry.method].read_text()
    recontrast = entries[0]
    mean = np.mean(list(recontrast.per_category["image_auroc"].values()))
    assert abs(mean - recontrast.values["image_auroc"]) < 0.05  # the categories' figures give the table's mean
