"""Splits: counts against published figures and exact arithmetic, files of every format, balanced batches, runs."""

import csv
import json
import re
import shlex
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anomalib_lite.data import split_files, splits
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import MVTEC, VISA, read_folder, read_mvtec, read_visa
from anomalib_lite.data.sampler import TrainBatchSampler
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.splits import read_as
from tests.helpers import real_images as real
from tests.helpers.image_trees import make_mvtec, make_visa
from tests.helpers.run_programs import (
    Outcome,
    assert_refused,
    evaluate,
    folder_data,
    predict,
    result_of,
    run,
    succeeded,
    train,
)

FULL = {"mvtec": {c: n[0] for c, n in MVTEC.items()}, "visa": {c: n[0] for c, n in VISA.items()}}


def touched(root: Path, counts: dict[str, int], good: int = 1, broken: int = 2) -> Path:
    """A tree in the MVTec layout of empty files: what a reader and a split look at."""
    for category, number in counts.items():
        for part, many in (("train/good", number), ("test/good", good), ("test/broken", broken)):
            folder = root / category / part
            folder.mkdir(parents=True)
            for i in range(many):
                (folder / f"{i:03}.png").touch()
    return root


def names(samples) -> set[str]:
    return {f"{s.category}/{s.path.parent.parent.name}/{s.path.parent.name}/{s.path.name}" for s in samples}


def splits_program(*arguments: str | Path) -> Outcome:
    from anomalib_lite.splits import main

    return run(main, *arguments)


# --- profiles --------------------------------------------------------------------------------------------------------


def test_every_published_count_from_class_counts_alone():
    orders = {"": {"size": "size", "alpha": "name"}, "reverse_": {"size": "reverse", "alpha": "reverse_name"}}
    rows = list(csv.DictReader(Path(__file__).with_name("long_tail_counts.csv").read_text().splitlines()))
    assert len(rows) == 40
    for row in rows:
        found = re.fullmatch(r"(mvtec|visa)_(reverse_|)(exp|step)(\d+)_(size|alpha)", row["config"])
        assert found
        data, reverse, profile, imbalance, by = found.groups()
        kept = splits.class_counts(FULL[data], profile, int(imbalance), orders[reverse][by])
        assert kept == json.loads(row["per_class"]), row["config"]
        assert list(kept) == list(json.loads(row["per_class"])), row["config"]  # in the classes' order
        assert sum(kept.values()) == int(row["total"])


@pytest.mark.parametrize("classes", [2, 3, 7, 12])
def test_rounding_down_is_exact(classes):
    """n is the largest whole number with n^(C-1) · IF^i ≤ N^(C-1): in integers, no powers are rounded."""
    for most in (3, 60, 98, 300, 391, 900, 7000):
        for imbalance in (1, 2, 7, 20, 49, 100, 500):
            counts = {f"c{i:02}": most for i in range(classes)}
            kept = splits.class_counts(counts, "exp", imbalance, "name")
            for i, n in enumerate(kept.values()):
                power = classes - 1
                least = (n + 1) ** power * imbalance**i > most**power
                assert least
                assert n == 1 or n**power * imbalance**i <= most**power
            tail = list(splits.class_counts(counts, "step", imbalance, "name").values())[-(classes // 2) :]
            assert set(tail) == {max(1, most // imbalance)}


def test_ties_go_by_name():
    assert splits.ordered({"b": 2, "a": 2, "c": 3}, "size") == ["c", "a", "b"]
    assert splits.ordered({"b": 2, "a": 2, "c": 3}, "reverse") == ["b", "a", "c"]


def test_one_category_is_full(tmp_path):
    data = read_folder(touched(tmp_path, {"bottle": 7}), "bottle")
    split = splits.long_tail(data, "exp", 100)
    assert (len(split.train), split.profile, split.head, split.tail) == (7, "full", [], [])


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_a_smaller_imbalance_keeps_a_superset(tmp_path, profile):
    data = read_folder(touched(tmp_path, {"a": 40, "b": 30, "c": 35, "d": 9, "e": 33}), "all")
    kept = {n: names(splits.long_tail(data, profile, n).train) for n in (1, 2, 5, 20, 100, 1000)}
    for less, more in zip(list(kept)[1:], list(kept), strict=False):
        assert kept[less] < kept[more] or kept[less] == kept[more]
    assert len(kept[1000]) < len(kept[20]) < len(kept[2]) < len(kept[1]) == 147
    split = splits.long_tail(data, profile, 20)
    assert split.counts == splits.class_counts(split.full, profile, 20)
    assert (split.head, split.tail) == (["a", "c", "e"], ["b", "d"])
    assert [s.path for s in split.train] == sorted(s.path for s in split.train)  # the data set's order


def test_the_draw_follows_split_seed_and_the_class_alone(tmp_path):
    touched(tmp_path, {"a": 40, "b": 40, "c": 40})
    data = read_folder(tmp_path, "all")
    draws = {seed: splits.long_tail(data, "exp", 10, "name", seed) for seed in (0, 1)}
    assert names(draws[0].train) != names(draws[1].train)
    assert draws[0].counts == draws[1].counts
    fewer = splits.long_tail(read_folder(tmp_path, ["c", "b"]), "step", 4, ["b", "c"])
    of_c = {name for name in names(draws[0].train) if name.startswith("c/")}  # 4 images, of the 10 that the step keeps
    assert of_c < {name for name in names(fewer.train) if name.startswith("c/")}
    step = splits.long_tail(data, "step", 4, "name")
    of = {c: {s.path.name for s in step.train if s.category == c} for c in "bc"}
    split = splits.long_tail(data, "step", 4, ["c", "a", "b"])
    assert of["c"] != {s.path.name for s in split.train if s.category == "b"}  # each class has a draw of its own
    again = read_folder(touched(tmp_path / "elsewhere", {"a": 40, "b": 40, "c": 40}), "all")
    assert names(splits.long_tail(again, "exp", 10, "name").train) == names(draws[0].train)


def test_split_seed_is_independent_of_seed(tmp_path):
    for category in "ab":
        make_mvtec(tmp_path, category, train=12, good=1, defects={"broken": 1})
    made = {}
    for seed in (0, 1):
        for split_seed in (0, 1):
            split = partial(splits.long_tail, profile="exp", imbalance=3, seed=split_seed)
            data = AnomalyDataModule(read_folder, tmp_path, image_size=16, seed=seed, split=split)
            data.setup()
            made[seed, split_seed] = names(data.train_samples), data.fingerprint
    assert made[0, 0] == made[1, 0] != made[0, 1] == made[1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "log"}, "split.profile=log: choose exp or step"),
        ({"order": "random"}, "split.order=random: choose size, reverse, name, reverse_name, or give a list"),
        ({"order": ["a", "b", "x"]}, "split.order: 'x' is no category of this run"),
        ({"order": ["a", "b", "a"]}, "split.order: 'a' is listed 2 times"),
        ({"order": ["a", "b"]}, "split.order: 'c' is missing; name each of these once: c, b, a"),
    ],
)
def test_profiles_are_checked(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        splits.class_counts({"a": 1, "b": 2, "c": 3}, **({"profile": "exp", "imbalance": 2} | options))


# --- few shots -------------------------------------------------------------------------------------------------------


def test_shots_are_nested_and_each_class_has_a_draw_of_its_own(tmp_path):
    touched(tmp_path, {"a": 40, "b": 9, "c": 40})
    data = read_folder(tmp_path, "all")
    kept = {(shots, seed): splits.few_shots(data, shots, seed) for shots in (1, 2, 4, 9) for seed in range(5)}
    for (shots, seed), split in kept.items():
        assert split.counts == dict.fromkeys("abc", shots)
        assert (split.profile, split.head, split.tail, split.full) == ("shots", [], [], {"a": 40, "b": 9, "c": 40})
        assert split.train == [s for s in data.train if s in split.train]  # in the data set's order
        for fewer in (1, 2, 4):
            assert fewer >= shots or names(kept[fewer, seed].train) < names(split.train)
        alone = splits.few_shots(read_folder(tmp_path, ["c"]), shots, seed)  # one category too has few shots
        assert names(alone.train) == {name for name in names(split.train) if name.startswith("c/")}
    first = {c: [s.path.name for s in kept[4, 0].train if s.category == c] for c in "ac"}
    assert first["a"] != first["c"]
    assert len({frozenset(names(kept[4, seed].train)) for seed in range(5)}) == 5
    elsewhere = read_folder(touched(tmp_path / "elsewhere", {"a": 40, "b": 9, "c": 40}), "all")
    assert names(splits.few_shots(elsewhere, 4, 1).train) == names(kept[4, 1].train)


def test_shots_draw_every_image_equally_often(tmp_path):
    data = read_folder(touched(tmp_path, {"a": 8}), "all")
    drawn = Counter(s.path.name for seed in range(400) for s in splits.few_shots(data, 2, seed).train)
    assert len(drawn) == 8
    assert all(60 < times < 140 for times in drawn.values())  # 100 expected, with a standard deviation of 8.7


# --- files -----------------------------------------------------------------------------------------------------------

KEPT = ["bottle/train/good/000.png", "bottle/train/good/002.png", "cable/train/good/001.png"]


@pytest.fixture
def tree(tmp_path):
    return read_folder(touched(tmp_path / "data", {"bottle": 3, "cable": 2}), "all")


def written(file: Path, text: str) -> Path:
    file.write_bytes(text.encode())
    return file


def jsonl(paths, **more) -> str:
    rows = [{"filename": p, "label": 0, "label_name": "good", "clsname": p.split("/")[0]} | more for p in paths]
    return "\n".join(json.dumps(row) for row in rows)


def meta(paths, indent: int | None = 4) -> str:
    part: dict[str, list] = {}
    for path in paths:
        cls = path.split("/")[0]
        entry = {"img_path": path, "mask_path": "", "cls_name": cls, "specie_name": "good", "anomaly": 0}
        part.setdefault(cls, []).append(entry)
    test = {"bottle": [{"img_path": "bottle/test/broken/000.png", "cls_name": "bottle", "anomaly": 1}]}
    return json.dumps({"train": part, "test": test}, indent=indent)


def table(paths) -> str:
    rows = [f"{p.split('/')[0]},train,normal,{p}," for p in paths]
    return "\r\n".join(["object,split,label,image,mask", *rows, "bottle,test,anomaly,bottle/test/broken/000.png,m.png"])


FORMATS = {
    "jsonl": ("train.json", jsonl(KEPT) + "\n\n"),
    "meta": ("meta.json", meta(KEPT)),
    "meta in one line": ("meta.json", meta(KEPT, None)),
    "csv": ("split.csv", table(KEPT)),
    "csv of paths": ("split.csv", "\n".join(["path", *KEPT])),
    "list": ("good.txt", "\n".join(KEPT)),
    "list with CRLF and a mark": ("good.txt", "\ufeff" + "\r\n".join([*KEPT, ""])),
    "absolute elsewhere": ("good.txt", "\n".join(f"/home/bottle/mvtec/{p}" for p in KEPT)),
    "below a folder": ("good.txt", "\n".join(f"./data/cable/{p}" for p in KEPT)),
    "Windows": ("good.txt", "\n".join("C:\\mvtec\\" + p.replace("/", "\\") for p in KEPT)),
    "below the class": ("a.json", "\n".join(jsonl([p]).replace(p, p.split("/", 1)[1], 1) for p in KEPT)),
    "other classes": ("good.txt", "\n".join([*KEPT, "screw/train/good/000.png", "a/b/zipper/train/good/1.png"])),
    "prune": ("prune_good.txt", "bottle/train/good/001.png\ncable/train/good/000.png\n"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_formats(case, tree, tmp_path):
    name, text = FORMATS[case]
    split = splits.from_file(tree, written(tmp_path / name, text))
    assert names(split.train) == set(KEPT)
    assert split.counts == {"bottle": 2, "cable": 1}
    assert (split.profile, split.head, split.tail) == ("file", ["bottle"], ["cable"])
    assert any(note.startswith("cable: a single training image (") for note in split.notes)


def test_a_list_is_pruned_by_name_or_on_request(tree, tmp_path):
    pruned = "bottle/train/good/001.png\ncable/train/good/000.png\n"
    listed = splits.from_file(tree, written(tmp_path / "list.txt", pruned))
    left = splits.from_file(tree, tmp_path / "list.txt", "prune")
    assert names(listed.train) == set(pruned.split())
    assert names(left.train) == set(KEPT)


def test_head_and_order_of_a_file(tmp_path):
    data = read_folder(touched(tmp_path / "data", {"a": 1, "b": 4, "c": 4, "d": 2}), "all")
    file = written(tmp_path / "all.txt", "\n".join(sorted(names(data.train))))
    assert splits.from_file(data, file).head == ["b", "c"]
    assert splits.from_file(data, file, head=3).tail == ["a"]
    assert splits.from_file(data, file, order=["d", "a", "b", "c"]).head == ["d", "a"]
    tied = splits.from_file(data, file, head=1)
    assert any("'b' (head) and 'c' (tail) have 4 training images each" in note for note in tied.notes)
    with pytest.raises(UserError, match=r"split\.head=4: give a number of classes from 1 to 3"):
        splits.from_file(data, file, head=4)


def parts_and_classes(root: Path) -> DataSet:
    """Images PART/CLASS/FILE with the same names in every part."""
    train, test = (
        [Sample(root / part / c / f"{i}.png", c, "good", 0, None) for c in ("cat", "dog") for i in range(4)]
        for part in ("train", "test")
    )
    return DataSet(root, train, test)


def test_equal_names_in_several_parts(tmp_path):
    """The path below the root says which image is meant, wherever the root was; the class and the name do not."""
    data = parts_and_classes(tmp_path)
    listed = ["train/cat/1.png", "/home/me/train/dog/2.png"]
    split = splits.from_file(data, written(tmp_path / "a.txt", "\n".join(listed)))
    assert [s.path for s in split.train] == [tmp_path / "train/cat/1.png", tmp_path / "train/dog/2.png"]
    ambiguous = r"line 1: {} may be .*/train/cat/1.png and .*/test/cat/1.png; give the path below the data root"
    for file, text, path in (("b.txt", "cat/1.png", "cat/1.png"), ("b.json", jsonl(["1.png"], clsname="cat"), "1.png")):
        with pytest.raises(UserError, match=ambiguous.format(path)):
            splits.from_file(data, written(tmp_path / file, text))


@pytest.mark.parametrize("form", split_files.FORMATS)
@pytest.mark.parametrize("layout", ["mvtec", "visa", "one", "parts"])
def test_what_is_written_is_read_again(form, layout, tmp_path):
    if layout == "visa":
        make_visa(tmp_path / "data", "candle", train=6)
        make_visa(tmp_path / "data", "capsules", train=5)
        data = read_visa(tmp_path / "data", "all")
    elif layout == "parts":
        data = parts_and_classes(tmp_path / "data")
    else:
        touched(tmp_path / "data", {"bottle": 6, "a b,ü": 5})
        data = read_folder(tmp_path / "data" / ("a b,ü" if layout == "one" else ""), "all")
    train = [s for i, s in enumerate(data.train) if i % 3 != 1]
    file = tmp_path / ("prune_x.txt" if form == "prune" else f"x.{form}")
    split_files.write(file, form, data, train)
    split = splits.from_file(data, file)
    assert [s.path for s in split.train] == [s.path for s in train]
    if form == "csv" and layout == "visa":  # VisA's own reader reads it too
        table = tmp_path / "data" / "split_csv" / "1cls.csv"
        table.write_text(file.read_text())
        again = read_visa(tmp_path / "data", "all")
        assert [s.path for s in again.train] == [s.path for s in train]
        assert again.test == data.test


def test_visa_by_paths_of_the_other_layout(tmp_path):
    make_visa(tmp_path / "raw", "candle", train=3, good=2)
    raw = read_visa(tmp_path / "raw", "candle")
    converted = ["candle/train/good/0000.JPG", "candle/train/good/0002.JPG"]
    split = splits.from_file(raw, written(tmp_path / "converted.txt", "\n".join(converted)))
    assert [s.path.name for s in split.train] == ["0000.JPG", "0002.JPG"]
    with pytest.raises(UserError, match=r"line 1: .*0003\.JPG is a test image"):
        splits.from_file(raw, written(tmp_path / "test.txt", "candle/test/good/0003.JPG"))
    for name in ("train/good/0000.JPG", "train/good/0002.JPG", "test/good/0003.JPG", "test/bad/000.JPG"):
        (tmp_path / "1cls" / "candle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "1cls" / "candle" / name).touch()
    data = read_visa(tmp_path / "1cls", "candle")
    other = "\n".join(f"candle/Data/Images/Normal/{name}" for name in ("0000.JPG", "0002.JPG"))
    assert names(splits.from_file(data, written(tmp_path / "raw.txt", other)).train) == set(converted)


WRONG = {
    "empty": ("a.txt", "\n \n", "a.txt: the file is empty"),
    "no text": ("a.txt", None, "a.txt: no text in UTF-8"),
    "another format": ("a.txt", "\nhello\nworld", "a.txt line 2: not a format that is read here"),
    "an array": ("a.json", '[{"filename": "bottle/train/good/000.png"}]',
        "a.json line 1: not a format that is read here"),
    "outside": ("a.txt", "\n".join([*KEPT, "/etc/secret.png"]),
        "a.txt line 4: /etc/secret.png is outside the data root"),
    "upwards": ("a.txt", "\n".join([*KEPT, "../bottle/train/good/001.png"]),
        "a.txt line 4: .* leads out of the data root"),
    "upwards inside": ("a.txt", "bottle/../bottle/train/good/001.png", "a.txt line 1: .* leads out of the data root"),
    "missing": ("a.txt", "\n".join([*KEPT, "bottle/train/good/009.png"]),
        "line 4: .*/data/bottle/train/good/009.png is missing"),
    "no image": ("a.txt", "bottle/train/good", "line 1: .*/data/bottle/train/good is no image that the data set holds"),
    "missing of JSON": ("a.json", jsonl([*KEPT, "bottle/train/good/009.png"]), "a.json line 4: .*009.png is missing"),
    "missing of ADer": ("meta.json", meta([*KEPT, "cable/train/good/009.png"]),
        r"meta.json train.cable\[1\]: .*009.png is missing"),
    "twice": ("a.txt", "\n".join([*KEPT, "x/cable/train/good/001.png"]), "line 4: .* is in line 3 already; remove one"),
    "defective": ("a.txt", "\n".join([*KEPT, "cable/test/broken/000.png"]),
        "line 4: .* is defective; .*split.anomalous=true"),
    "defective by its label": ("a.json", jsonl(KEPT[:1]) + "\n" + jsonl(KEPT[1:], label=1),
        "a.json line 2: .* is defective"),
    "a test image": ("a.txt", "\n".join([*KEPT, "cable/test/good/000.png"]),
        "line 4: .* is a test image, .* stays whole"),
    "a test list": ("a.csv", "path,split\nbottle/test/good/000.png,test", "a.csv: no training entries in its 2 lines"),
    "a class without": ("a.txt", KEPT[0],
        "a.txt: no normal training image of 'cable'; .*data.category=.bottle."),
    "nothing of ours": ("a.txt", "screw/train/good/000.png", "a.txt: no normal training image of 'bottle'"),
    "a class pruned": ("prune_a.txt", "cable/train/good/000.png\n\ncable/train/good/001.png",
        "prune_a.txt line 3: leaves out the last training image of 'cable'"),
    "a test image pruned": ("prune_a.txt", "cable/test/good/000.png", "prune_a.txt line 1: .* is no training image"),
    "broken JSON lines": ("a.json", jsonl(KEPT) + '\n{"filename": ', "a.json line 4: no JSON object"),
    "broken JSON": ("meta.json", meta(KEPT)[:300], r"meta.json line \d+: no JSON"),
    "no path": ("a.json", '{"file": "x"}', "a.json line 1: no path in this entry"),
    "no train": ("meta.json", '{\n"test": {}\n}', 'meta.json: no {"train"'),
    "no list": ("meta.json", '{\n"train":\n{"bottle": 3}}', "meta.json: train.bottle is no list of entries"),
    "fields": ("a.csv", table(KEPT) + "\nbottle,train", "a.csv line 6: 5 fields are needed"),
    "split": ("a.csv", "image,split\nbottle/train/good/000.png,training\nbottle/train/good/001.png,fold1",
        "a.csv line 3: 'fold1' is neither train nor test"),
    "words": ("a.txt", "bottle/train/good/000.png\nbottle\n", "a.txt line 2: 'bottle' is no path"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_wrong(case, tree, tmp_path):
    name, text, message = WRONG[case]
    file = tmp_path / name
    file.write_bytes(b"\x89PNG\xff\x00" if text is None else text.encode())
    with pytest.raises(UserError, match=message) as found:
        splits.from_file(tree, file)
    assert "\n" not in str(found.value)


def test_wrong_format_on_request(tree, tmp_path):
    file = written(tmp_path / "good.txt", "\n".join(KEPT))
    for form, message in {
        "jsonl": "good.txt line 1: no JSON object",
        "meta": "good.txt line 1: no JSON",
        "csv": "good.txt line 1: no column for paths",
        "xml": "split.format=xml: choose auto, jsonl",
    }.items():
        with pytest.raises(UserError, match=message):
            splits.from_file(tree, file, form)
    for path, message in (
        (None, "split.path is not set"),
        (tmp_path / "no", "no: No such file"),
        (tmp_path, "[Dd]irectory"),
    ):
        with pytest.raises(UserError, match=message):
            splits.from_file(tree, path)


def test_defective_images_on_request(tree, tmp_path):
    text = jsonl(KEPT) + "\n" + jsonl(["cable/test/broken/000.png", "bottle/train/good/001.png"], label=1)
    split = splits.from_file(tree, written(tmp_path / "a.json", text), anomalous=True)
    found = {name: s.label for s in split.train for name in names([s])}
    assert found == dict.fromkeys(KEPT, 0) | {"cable/test/broken/000.png": 1, "bottle/train/good/001.png": 1}
    text = "a.json: 2 of 5 training images are defective (split.anomalous=true); images that are test images too: 1"
    assert text in split.notes
    assert "split.anomalous=true" in read_as(split)
    only = written(tmp_path / "b.json", jsonl(KEPT[:2]) + "\n" + jsonl(["cable/test/broken/000.png"]))
    with pytest.raises(UserError, match="no normal training image of 'cable'"):
        splits.from_file(tree, only, anomalous=True)
    for form in ("jsonl", "meta", "csv"):
        split_files.write(tmp_path / f"again.{form}", form, tree, split.train)
        again = splits.from_file(tree, tmp_path / f"again.{form}", anomalous=True)
        assert [(s.path, s.label) for s in again.train] == [(s.path, s.label) for s in split.train]


# --- balanced batches ------------------------------------------------------------------------------------------------

CLASSES = ["a"] * 50 + ["b"] * 7 + ["c"]


def epoch_of(batches: TrainBatchSampler, epoch: int) -> list[list[tuple[int, int]]]:
    batches.next_batch = epoch * len(batches)
    return list(batches)


def balanced(rank=0, world=1, size=6, **more) -> TrainBatchSampler:
    return TrainBatchSampler(len(CLASSES), size, 3, rank, world, classes=CLASSES, **more)


def test_an_epoch_draws_every_class_equally_often():
    batches, drawn = balanced(), Counter[tuple[int, int]]()
    assert len(batches) == 10  # 60 draws: 58 images rounded up to a multiple of 3 classes
    for epoch in range(5):
        found = epoch_of(batches, epoch)
        assert [len(batch) for batch in found] == [6] * 10
        for batch in found:  # each batch too, where its size is a multiple of the classes
            assert Counter(CLASSES[index] for _, index in batch) == {"a": 2, "b": 2, "c": 2}
        drawn.update(key for batch in found for key in batch)
    firsts = {CLASSES[batch[0][1]] for epoch in range(2) for batch in epoch_of(batches, epoch)}
    assert firsts == {"a", "b", "c"}  # in no fixed order
    assert max(drawn.values()) == 1  # (times drawn before, index): never the same augmentation twice
    times = Counter(index for _, index in drawn)
    assert {times[i] for i in range(50)} == {2}  # 100 draws of 50 images
    assert {times[i] for i in range(50, 57)} == {14, 15}
    assert times[57] == 100


def test_balanced_batches_follow_seed_epoch_and_nothing_else():
    epochs = [epoch_of(balanced(), epoch) for epoch in range(3)]
    batches = balanced()
    assert [epoch_of(batches, e) for e in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert epochs[0] != epochs[1]
    assert list(TrainBatchSampler(58, 6, 4, classes=CLASSES)) != epochs[0]
    for world in (2, 3):
        shares = [epoch_of(balanced(rank, world), 1) for rank in range(world)]
        assert [
            [key for row in zip(*batch, strict=True) for key in row] for batch in zip(*shares, strict=True)
        ] == epochs[1]
    resumed = balanced(first_batch=2 * len(balanced()) + 4)
    assert list(resumed) == epochs[2][4:]


def test_balanced_data_module(tmp_path):
    for category, number in (("bottle", 9), ("cable", 2)):
        make_mvtec(tmp_path, category, train=number, good=1, defects={"broken": 1})
    data = AnomalyDataModule(read_folder, tmp_path, image_size=16, batch_size=4, balanced=True)
    data.setup()
    seen = Counter(c for batch in data.train_dataloader() for c in batch["category"].tolist())
    assert seen == {0: 6, 1: 6}
    assert sum(len(batch["path"]) for batch in data.train_eval_dataloader()) == 11  # once each, for closed forms


def test_defective_training_images_are_not_held_out(tmp_path):
    make_mvtec(tmp_path / "data", "bottle", train=6, good=1, defects={"broken": 6})
    paths = [f"bottle/train/good/{i:03}.png" for i in range(6)]
    broken = jsonl([f"bottle/test/broken/{i:03}.png" for i in range(6)], label=1)
    file = written(tmp_path / "a.json", jsonl(paths) + "\n" + broken)
    split = partial(splits.from_file, path=file, anomalous=True)
    data = AnomalyDataModule(read_folder, tmp_path / "data", image_size=16, val_fraction=0.5, split=split)
    data.setup()
    assert [s.path.parent.name for s in data.val_samples] == ["good"] * 3
    assert [s.label for s in data.train_samples] == [0] * 3 + [1] * 6


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for category, number in (("bottle", 8), ("cable", 6), ("screw", 7)):
        make_mvtec(root, category, train=number, good=2, defects={"broken": 2})
    return root


CLOSED = ("method=norm_occ_closed_form",)


def test_a_run_on_a_long_tail(root, tmp_path):
    arguments = [*folder_data(root, "all"), *CLOSED, "split=exp", "split.imbalance=4"]
    result = result_of(*arguments, run_dir=tmp_path / "run")
    assert result["data"]["train_counts"] == {"bottle": 8, "cable": 2, "screw": 4}
    split = result["split"]
    assert (split["name"], split["profile"], split["imbalance"], split["order"], split["seed"]) == (
        "exp",
        "exp",
        4,
        "size",
        0,
    )
    assert (split["head"], split["tail"]) == (["bottle", "screw"], ["cable"])
    assert split["counts"] == result["data"]["train_counts"]
    assert split["full_counts"] == {"bottle": 8, "cable": 6, "screw": 7}
    for name, members in (("head", ["bottle", "screw"]), ("tail", ["cable"])):
        assert result["groups"][name].keys() == result["metrics"].keys()
        for key, value in result["groups"][name].items():
            if key == "aupimo":  # these images have too few normal pixels
                assert value is None
                continue
            assert value == pytest.approx(np.mean([result["per_category"][c][key] for c in members]), abs=1e-12)
    succeeded(evaluate(f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"))
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert {k: again[k] for k in ("split", "groups", "metrics", "data")} == {
        k: result[k] for k in ("split", "groups", "metrics", "data")
    }
    one = result_of(*folder_data(root), *CLOSED, "split=step100", run_dir=tmp_path / "one")
    assert (one["split"]["profile"], one["groups"], one["data"]["train_counts"]) == ("full", None, {"bottle": 8})
    full = result_of(*folder_data(root), *CLOSED, run_dir=tmp_path / "full")
    assert full["data"]["fingerprint"] == one["data"]["fingerprint"]


def test_a_run_on_a_file(root, tmp_path, monkeypatch):
    paths = [f"bottle/train/good/{i:03}.png" for i in range(5)] + ["cable/train/good/003.png"]
    file = written(tmp_path / "split.json", jsonl(paths) + "\n" + jsonl(["cable/test/broken/000.png"], label=1))
    monkeypatch.chdir(tmp_path)
    arguments = [*folder_data(root, "[bottle,cable]"), "split=file", "split.path=split.json", "split.anomalous=true"]
    arguments += ["method=norm_occ", "trainer.max_steps=3", "trainer.max_epochs=null", "data.balanced=true"]
    refused = train(*arguments[:-5], "split.anomalous=false", *CLOSED, f"hydra.run.dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert re.fullmatch(r"(.* INFO .*\n)?error: .*split.json line 7: .* is defective; .*\n", refused.err)
    outcome = train(*arguments, f"hydra.run.dir={tmp_path / 'run'}")  # the folder is still free
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["data"]["train_anomalous"] == 1
    assert result["data"]["train_counts"] == {"bottle": 5, "cable": 2}
    assert result["split"]["path"] == str(tmp_path / "split.json")
    assert result["thresholds"]["per_category"]["cable"]["images"] == 1  # of normal images alone
    done = predict(f"run={tmp_path / 'run'}", f"input={root / 'cable/test'}", "output=seen", "category=cable")
    assert done.code == 0, done.err
    # a list that has changed is refused, and accepted again as it was
    text = file.read_text()
    file.write_text(text.replace("cable/train/good/003.png", "cable/train/good/002.png"))
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.chdir("/")
    arguments[arguments.index("split.path=split.json")] = f"split.path={file}"
    changed = train(*arguments, "resume=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert changed.code == 2
    assert "split.json may have changed" in changed.err
    file.write_text(text)
    again = train(*arguments, "resume=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == result["metrics"]


def test_a_run_with_few_shots(root, tmp_path):
    data = folder_data(root, "all")
    result = result_of(*data, *CLOSED, "split=shots", "split.shots=3", "split.seed=2", run_dir=tmp_path / "run")
    full = result_of(*data, *CLOSED, run_dir=tmp_path / "full")
    counts = dict.fromkeys(result["categories"], 3)
    assert result["data"]["train_counts"] == result["split"]["counts"] == counts
    split = {key: result["split"][key] for key in ("name", "profile", "shots", "seed", "full_counts")}
    assert split == {"name": "shots", "profile": "shots", "shots": 3, "seed": 2} | {
        "full_counts": full["data"]["train_counts"]
    }
    assert result["groups"] is None
    assert result["data"]["fingerprint"] != result["data"]["full_fingerprint"] == full["data"]["fingerprint"]
    line = f"split shots: {3 * len(counts)} of {sum(full['data']['train_counts'].values())} training images; bottle 3"
    assert line in (tmp_path / "run" / "train.log").read_text()
    assert any("fewer than 50 normal training images" in note and "bottle (3)" in note for note in result["notes"])
    succeeded(evaluate(f"run={tmp_path / 'run'}", f"output={tmp_path / 'again'}"))
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert {k: again[k] for k in ("split", "metrics", "data")} == {k: result[k] for k in ("split", "metrics", "data")}


def test_few_shots_with_folds_and_held_out_images(root, tmp_path):
    shots = [*folder_data(root), "split=shots", "split.shots=4"]
    result = result_of(*shots, *CLOSED, "method.folds=2", "data.val_fraction=0.5", run_dir=tmp_path / "run")
    assert result["data"]["train_counts"] == {"bottle": 2}
    assert result["validation"]["image_auroc"] is not None
    outcome = train(*shots, *CLOSED, "method.folds=5", f"hydra.run.dir={tmp_path / 'folds'}")
    assert outcome.code == 2
    assert "error: method.folds=5: more folds than training images; give fewer, or 0\n" in outcome.err
    one = result_of(*shots, "split.shots=1", "method=patchcore", "data.val_fraction=0.2", run_dir=tmp_path / "one")
    assert one["data"]["train_counts"] == {"bottle": 1}
    assert "bottle: 1 training images are too few to validate on a share of them" in one["notes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=shots", "split.shots=7"], "split.shots=7: 'cable' has only 6 training images; give at most 6"),
        (["split=shots", "split.imbalance=3"], "split.imbalance: no such option"),
        (["split=exp100", "split.order=[bottle,cable]"], "split.order: 'screw' is missing"),
        (["split=exp100", "split.order=[bottle,cable,screw,wood]"], "split.order: 'wood' is no category"),
        (["split=file"], "split.path=null: give the file"),
        (["split=file", "split.path=/no/such.txt"], "split.path=/no/such.txt: no such file"),
        (["split=full", "split.imbalance=3"], "split.imbalance: no such option"),
    ],
)
def test_options_are_checked_before_training(root, tmp_path, arguments, message):
    outcome = train(*folder_data(root, "all"), *CLOSED, *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert_refused(outcome, f"^error: {re.escape(message)}")


def test_a_single_training_image_is_told_before_training(root, tmp_path):
    succeeded(train(*folder_data(root, "all"), "split=step10", f"hydra.run.dir={tmp_path / 'run'}", "method=norm_occ"))
    log = (tmp_path / "run" / "train.log").read_text()
    told = "split step10: 16 of 21 training images; head bottle 8, screw 7; tail cable 1"
    assert log.index(told) < log.index("cable: a single training image") < log.index("training 4/4")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "cable: a single training image" in result["notes"]


# --- the program -----------------------------------------------------------------------------------------------------


def test_program_prints_counts_without_images():
    outcome = succeeded(splits_program("--counts", "mvtec", "split=exp100"))
    rows = [line.split() for line in outcome.out.splitlines()]
    expected = splits.class_counts(FULL["mvtec"], "exp", 100)
    assert [(row[0], int(row[2])) for row in rows if len(row) > 4 and row[1] in ("head", "tail")] == list(
        expected.items()
    )
    assert ["all", "1378", "3629", "38.0", "%"] in rows
    bars = {row[0]: row[-1].count("█") for row in rows if len(row) > 4 and row[1] in ("head", "tail")}
    assert bars["hazelnut"] > 30
    assert bars["screw"] == pytest.approx(bars["hazelnut"] * 281 / 391, abs=1)
    given = splits_program("--counts", "a=10,b=20", "split=step20")
    assert re.search(r"a +tail +1 +10 +10.0 %", given.out)
    few = splits_program("--counts", "a=10,b=20", "split=shots", "split.shots=2")
    assert "shots 2, seed 0" in few.out
    assert re.search(r"a +2 +10 +20.0 %", few.out)
    more = splits_program("--counts", "a=10,b=20", "split=shots", "split.shots=11")
    assert (more.code, more.err) == (2, "error: split.shots=11: 'a' has only 10 training images; give at most 10\n")
    some = splits_program("--counts", "visa", "data.category=[candle,pcb1]", "split=exp100")
    assert re.search(r"candle +tail +9 +900 ", some.out)


@pytest.mark.parametrize("form", ["jsonl", "meta", "csv", "list", "prune"])
def test_program_writes_what_training_reads(form, root, tmp_path):
    file = tmp_path / ("prune_cable.txt" if form == "prune" else f"split.{form}")
    data = [*folder_data(root)[:2]]
    made = splits_program(*data, "split=exp", "split.imbalance=4", "--write", file, "--format", form)
    assert made.code == 0, made.err
    again = splits_program(*data, "split=file", f"split.path={file}")
    assert again.code == 0, again.err
    rows = [re.findall(r"^ +(bottle|cable|screw) +\w+ +(\d+) ", out, re.MULTILINE) for out in (made.out, again.out)]
    assert rows[0] == rows[1] == [("bottle", "8"), ("screw", "4"), ("cable", "2")]


def listed(root: Path, file: Path) -> Path:
    """A table of the images of a root in the MVTec layout."""
    data = read_folder(root, "all")
    rows = [(s, part) for part, samples in (("train", data.train), ("test", data.test)) for s in samples]
    lines = [f"{s.path.relative_to(root)},{s.category},{s.defect},{part},{s.mask or ''}" for s, part in rows]
    return written(file, "\n".join(["path,category,label,split,mask", *lines]))


@pytest.mark.parametrize("own", [False, True])
def test_program_writes_few_shots(own, root, tmp_path):
    """Of the layout, and of a table, which is an option of its reader."""
    table = ["data=table", f"data.table={listed(root, tmp_path / 'all.csv')}", f"data.root={root}"]
    chosen = [*(table if own else folder_data(root)[:2]), "split=shots", "split.shots=2", "split.seed=3"]
    made = splits_program(*chosen, "--write", tmp_path / "few.json")
    assert made.code == 0, made.err
    data = read_folder(root, "all")
    assert splits.from_file(data, tmp_path / "few.json").train == splits.few_shots(data, 2, 3).train
    again = splits_program(*shlex.split(made.out.rpartition("its arguments: ")[2]))
    assert re.findall(r"(bottle|cable|screw) +\w* +2 ", again.out) == ["bottle", "cable", "screw"]


@pytest.mark.parametrize(
    "split", [["split=exp", "split.order=reverse"], ["split=step", "split.order=[screw,bottle,cable]"], ["split=exp"]]
)
def test_the_arguments_of_a_written_split_keep_head_and_tail(split, root, tmp_path):
    made = splits_program(*folder_data(root)[:2], *split, "split.imbalance=2", "--write", tmp_path / "split.json")
    arguments = shlex.split(made.out.rpartition("its arguments: ")[2])
    again = splits_program(*arguments)
    rows = [re.findall(r"^ +(bottle|cable|screw) +(head|tail) +(\d+) ", out, re.M) for out in (made.out, again.out)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    assert any("split.order" in a for a in arguments) == ("step" in split[0])  # the others come out in order of size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=foo"], "split=foo: no such choice"),
        (["split"], "split: arguments are KEY=VALUE"),
        (["--counts", "mvtec", "split=file", "split.path=x"], "--counts: this split is made of files"),
        (["--counts", "bottle"], "--counts bottle: give mvtec, visa, or each class once"),
        (["--counts", "mvtec", "data.category=[candle]"], "data.category: 'candle' is not in --counts"),
        (["--counts", "mvtec", "--write", "x"], "--write x: a file lists images"),
        (["--write", "x.dat"], "--write x.dat: its name tells no format; give --format: choose jsonl"),
        (["--format", "csv"], "--format csv: of which file? give --write FILE"),
        (["--write", "good.txt", "--format", "prune"], "good.txt: a file called prune_"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["data.root=/no"], "/no: no such folder"),
        (["--write", "/proc/x.json"], "/proc/x.json: "),
    ],
)
def test_program_is_told_nonsense(root, arguments, message):
    data = folder_data(root)[:2] if arguments[0].startswith("--write") else ["data=folder"]
    assert_refused(splits_program(*data, *arguments), f"^error: {re.escape(message)}")


# --- published manifests ---------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("data", ["mvtecad-nlt", "visa-nlt"])
def test_tailedcore_manifests(data, tmp_path):
    """Every manifest keeps its published number of images of each class, on a tree with all files that they name."""
    folder = real.parts().parents[1] / "splits" / "tailedcore_nlt"
    if not folder.is_dir():
        pytest.skip("no splits/tailedcore_nlt beside the data")
    full, read = (FULL["mvtec"], read_mvtec) if data == "mvtecad-nlt" else (FULL["visa"], read_visa)
    files = sorted((folder / "manifest" / data).rglob("prune_good.txt"))
    assert len(files) == 15
    listed = {path for file in files for path in file.read_text().split()}
    for category, number in full.items():
        mine = sorted(path for path in listed if path.startswith(f"{category}/"))
        more = [f"{category}/train/good/unnamed_{i}.png" for i in range(number - len(mine))]
        (tmp_path / category / "train" / "good").mkdir(parents=True)
        for path in mine + more:
            (tmp_path / path).touch()
        assert len(mine + more) == number
    there = read(tmp_path, "all")
    counts = {(r["dataset"], r["scheme"], r["seed"]): r for r in csv.DictReader((folder / "counts.csv").open())}
    for file in files:
        scheme, seed = file.parent.parent.name, int(file.parent.name.removeprefix("seed"))
        row, split = counts[data, scheme, str(seed)], splits.from_file(there, file)
        assert split.counts == json.loads(row["kept_per_class"])
        assert len(split.train) == int(row["kept_good"])
        injected = file.with_name("inject_defects.txt")  # copies of test images that are not there
        with pytest.raises(UserError, match=r"inject_defects\.txt line 1: .* is missing"):
            splits.from_file(there, injected)


@pytest.mark.real
def test_uniad_lists(tmp_path):
    folder = real.parts().parents[1] / "splits" / "uniad_format"
    if not folder.is_dir():
        pytest.skip("no splits/uniad_format beside the data")
    there = read_mvtec(touched(tmp_path, FULL["mvtec"]), "all")
    split = splits.from_file(there, folder / "train.json")
    assert split.counts == FULL["mvtec"]
    with pytest.raises(UserError, match=r"test\.json line 1: .*"):
        splits.from_file(there, folder / "test.json")
