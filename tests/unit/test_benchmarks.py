"""The readers of benchmarks on small trees in their published layouts."""

import functools
import json
import re
import shutil

import numpy as np
import pytest

from anomalib_lite.data import benchmarks, splits
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.held_out import fingerprint
from anomalib_lite.data.integrity import check
from anomalib_lite.data.kolektor import read_kolektor_sdd, read_kolektor_sdd2
from anomalib_lite.data.masks import Saturation
from anomalib_lite.data.readers import read_test_set
from anomalib_lite.data.real_iad import CATEGORIES, TOTALS, read_real_iad
from anomalib_lite.data.samples import load_mask
from tests.helpers import benchmark_trees as trees
from tests.helpers.image_trees import save_image, save_mask
from tests.unit.test_readers import refused

READERS = {
    "mvtec_ad_2": benchmarks.read_mvtec_ad_2,
    "mvtec_loco": benchmarks.read_mvtec_loco,
    "real_iad": read_real_iad,
    "btad": benchmarks.read_btad,
    "mpdd": benchmarks.read_mpdd,
    "kolektor_sdd": read_kolektor_sdd,
    "kolektor_sdd2": read_kolektor_sdd2,
}
#: per data set: categories, and of each its training images, {defect: test images}, pixels of the masks in order
FOUND = {
    "mvtec_ad_2": (["can", "rice"], 4, {"good": 2, "bad": 2}, [64, 64]),
    "mvtec_loco": (
        ["pushpins", "screw_bag"], 4, {"good": 2, "logical_anomalies": 2, "structural_anomalies": 1}, [160, 36, 81],
    ),
    "real_iad": (["audiojack", "zipper"], 4, {"good": 4, "AK": 2}, [64, 64]),
    "btad": (["01", "03"], 4, {"good": 2, "ko": 2}, [64, 64]),
    "mpdd": (["connector", "tubes"], 4, {"good": 2, "parts_mismatch": 2}, [64, 64]),
    "kolektor_sdd": (["kolektor_sdd"], 8, {"good": 2, "defect": 2}, [64, 64]),
    "kolektor_sdd2": (["kolektor_sdd2"], 4, {"good": 3, "defect": 1}, [64]),
}  # fmt: skip
#: notes on the small trees, in order
NOTES = {
    "mvtec_ad_2": (
        "2 images in validation are not used: they are normal images for validation",
        "2 images in test_private are not used: they have no labels",
        "2 images in test_private_mixed are not used: they have no labels",
        "can: 4 train images, officially 412; 2 good test images, officially 72; 2 defective test images, ",
        "rice: 4 train images, officially 313",
        "6 of MVTec AD 2's 8 categories are not on disk: fabric, fruit_jelly",
    ),
    "mvtec_loco": (
        "2 images in validation are not used",
        "pushpins: 4 train images, officially 372; 2 good test images, officially 138; 3 defective test",
        "screw_bag: 4 train images, officially 360",
        "3 of MVTec LOCO's 5 categories are not on disk",
    ),
    "real_iad": ("28 of Real-IAD's 30 categories are not on disk: bottle_cap, ",),
    "btad": (
        "01: 4 train images, officially 400; 2 good test images, officially 21; 2 defective test images, officially 49",
        "03: 4 train images, officially 1000",
        "1 of BTAD's 3 categories are not on disk: 02",
    ),
    "mpdd": (
        "connector: 4 train images, officially 128; 2 good test images, officially 30; 2 defective test images, offi",
        "tubes: 4 train images, officially 122",
        "4 of MPDD's 6 categories are not on disk",
    ),
    "kolektor_sdd": (
        "kolektor_sdd: 10 normal images, officially 347; 2 defective images, officially 52",
        "kolektor_sdd: the split is ours, .* every fifth item are test images .kos05.",
    ),
    "kolektor_sdd2": (
        "2 files or folders are not used .first: .*10001 .copy..png",
        "kolektor_sdd2: 1 defective training images left out",
        "kolektor_sdd2: 4 train images, officially 2085; 3 good test images, officially 894; 1 defective test images, ",
    ),
}
ALL = pytest.mark.parametrize("name", READERS)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp("data") / name) for name, make in trees.MAKERS.items()}


def test_official_totals():
    def sums(official):
        return np.sum(list(official.values()), axis=0).tolist()

    assert sums(benchmarks.MVTEC_AD_2) == [2528, 379, 705]
    assert sums(benchmarks.MVTEC_LOCO) == [1778, 575, 993]
    assert sums(benchmarks.BTAD) == [1799, 451, 290]
    assert sums(benchmarks.MPDD) == [888, 176, 282]
    assert len(CATEGORIES) == 30
    assert sum(TOTALS["realiad_jsons"]) == 5 * sum(TOTALS["realiad_jsons_sv"]) == 151050


@ALL
def test_reads(name, roots):
    categories, train, kinds, areas = FOUND[name]
    data = READERS[name](roots[name], "all")
    assert data.root == roots[name]
    assert list(dict.fromkeys(s.category for s in data.train)) == categories
    for category in categories:
        good = [s for s in data.train if s.category == category]
        test = [s for s in data.test if s.category == category]
        assert len(good) == train
        assert all((s.defect, s.label, s.mask) == ("good", 0, None) for s in good)
        assert {kind: sum(s.defect == kind for s in test) for kind in {s.defect: 0 for s in test}} == kinds
        assert all((s.label == 0) == (s.defect == "good") == (s.mask is None) for s in test)
        masks = [load_mask(s.mask) for s in sorted(test, key=lambda s: (s.defect, s.path)) if s.mask]
        assert [int(mask.sum()) for mask in masks] == areas
    check(data, thorough=True)
    assert len(data.notes) == len(NOTES[name]), data.notes
    for note, start in zip(data.notes, NOTES[name], strict=True):
        assert re.match(start, note), note
    one = READERS[name](str(roots[name]), [categories[-1]])
    assert {s.category for s in [*one.train, *one.test]} == {categories[-1]}
    refused("did you mean|no category 'nuts'", READERS[name], roots[name], ["nuts"])


@ALL
def test_wrong_root(name, tmp_path):
    message = {
        "mvtec_ad_2": "no category in this folder; set data.root to the folder that holds MVTec AD 2's can, fabric",
        "mvtec_loco": "set data.root to the folder that holds MVTec LOCO's breakfast_box, ",
        "real_iad": "realiad_jsons: no CATEGORY.json there, nor in .*data.reader.split_json names the folder",
        "btad": "set data.root to the folder that holds BTAD's 01, 02, 03",
        "mpdd": "set data.root to the folder that holds the categories",
        "kolektor_sdd": "no folders kos01, kos02, ...; set data.root",
        "kolektor_sdd2": "no folder train; set data.root",
    }[name]
    refused("no such folder; set data.root", READERS[name], tmp_path / "none", "all")
    refused(message, READERS[name], tmp_path, "all")


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("mvtec_ad_2", "can/train", "can/train/good: no training images .*put normal ones there"),
        ("mvtec_ad_2", "can/test_public/ground_truth/bad/000_mask.png", "bad/000.png: no mask .*add 000_mask.png to"),
        ("mvtec_loco", "pushpins/defects_config.json", "defects_config.json: no such file; sPRO needs its thresholds"),
        (
            "mvtec_loco",
            "pushpins/ground_truth/logical_anomalies/001",
            "001.png: no mask for this defective image; add 001/000.png to .*logical_anomalies",
        ),
        (
            "mvtec_loco",
            "pushpins/ground_truth/logical_anomalies/001/000.png",
            "logical_anomalies/001: no mask in the folder of an image's masks",
        ),
        ("mvtec_loco", "pushpins/test/structural_anomalies", "000: a mask for no image"),
        ("btad", "01/train/ok", "01/train/ok: no training images"),
        ("btad", "01/ground_truth/ko/0001.png", "0001.bmp: no mask for this defective image"),
        ("mpdd", "tubes/train", "tubes/train/good: no training images"),
        ("real_iad", "realiad_1024", "realiad_1024: no such folder; data.reader.images names the one with the images"),
        (
            "real_iad",
            "realiad_1024/zipper/OK/S0000",
            r"zipper.json train\[0\]: .*zipper_0000_OK_C1_2023.jpg is missing",
        ),
        ("real_iad", "realiad_1024/zipper/NG/AK/S0001", r"zipper.json test\[4\]: .* is missing; restore the file"),
        ("kolektor_sdd", "kos01/Part1_label.bmp", "Part1.jpg: no mask Part1_label.bmp beside it"),
        ("kolektor_sdd", "kos01/Part1.jpg", "Part1_label.bmp: a mask for no image"),
        ("kolektor_sdd2", "test/20001_GT.png", "20001.png: no mask 20001_GT.png beside it"),
        ("kolektor_sdd2", "train", "no folder train"),
        ("mvtec_ad_2", "can/test_public", "note: can: no test images, nothing can be measured"),
        ("mvtec_loco", "pushpins/ground_truth", "note: pushpins: no ground_truth, pixel metrics are left out"),
        ("btad", "01/test/ok", "note: 01: no good test images, image AUROC can't be computed"),
        ("kolektor_sdd2", "test", "note: kolektor_sdd2: no test images, nothing can be measured"),
    ],
)
def test_missing_parts(name, part, message, roots, tmp_path):
    """Each is refused, or noted where training does without it."""
    root = shutil.copytree(roots[name], tmp_path / "copy")
    lost = root / part
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    if message.startswith("note: "):
        assert message.removeprefix("note: ") in READERS[name](root, "all").notes
    else:
        refused(message, READERS[name], root, "all")


# --- what is special ---


def test_loco_masks(roots, tmp_path):
    """The union of an image's masks; thresholds; every file of a folder is checked and belongs to the fingerprint."""
    root = shutil.copytree(roots["mvtec_loco"], tmp_path / "loco")
    data = benchmarks.read_mvtec_loco(root, "pushpins")
    first = next(s for s in data.test if s.label)
    folder = root / "pushpins" / "ground_truth" / "logical_anomalies" / "000"
    assert first.mask == folder
    union = np.zeros((32, 32), bool)
    union[4:12, 4:12] = True
    union[10:20, 10:20] = True
    assert (load_mask(folder) == union).all()
    assert first.saturations == tuple(Saturation(pixel, *rest) for pixel, rest in trees.DEFECTS.items())
    absolute, relative, large = first.saturations
    assert (absolute.area(64), absolute.area(30)) == (40, 30)
    assert (relative.area(81), relative.area(2)) == (20, 1)
    assert large.area(36) == 36
    before = fingerprint(data)
    save_mask(folder / "002.png", value=253)
    assert fingerprint(benchmarks.read_mvtec_loco(root, "pushpins")) != before
    save_mask(folder / "002.png", size=16)
    refused("000/002.png: the mask is 16x16, its image 000.png 32x32", check, data)
    (folder / "002.png").write_bytes(b"")
    refused("002.png: the file is empty", check, data)
    shutil.copy(folder / "000.png", folder.parent)
    (folder / "002.png").unlink()
    refused("the masks of an image belong in .*STEM; move them", benchmarks.read_mvtec_loco, root, "pushpins")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '[{"pixel_value": 255}]',
        '[{"pixel_value": 255, "saturation_threshold": 2.0, "relative_saturation": true}]',
        '[{"pixel_value": 255, "saturation_threshold": 0, "relative_saturation": false}]',
        '[{"pixel_value": "a", "saturation_threshold": 1, "relative_saturation": false}]',
    ],
)
def test_loco_thresholds_that_mean_nothing(text, roots, tmp_path):
    root = shutil.copytree(roots["mvtec_loco"], tmp_path / "loco")
    (root / "pushpins" / "defects_config.json").write_text(text)
    refused("defects_config.json: .*restore the file", benchmarks.read_mvtec_loco, root, "pushpins")


def test_real_iad_protocols(roots, tmp_path):
    single = read_real_iad(roots["real_iad"], "audiojack", split_json="realiad_jsons_sv")
    assert [len(single.train), len(single.test)] == [2, 3]
    assert all("_C1_" in s.path.name for s in [*single.train, *single.test])
    both = read_real_iad(roots["real_iad"], ["audiojack"])
    normal_views = [s for s in both.test if "NG" in s.path.parts and not s.label]
    assert [s.path.name for s in normal_views] == ["audiojack_0000_AK_C2_2023.jpg", "audiojack_0001_AK_C2_2023.jpg"]

    root = trees.make_real_iad(tmp_path / "flat", ("audiojack",), nested=False)
    file = root / "realiad_jsons" / "audiojack.json"
    assert len(read_real_iad(tmp_path / "flat" / ".." / root.relative_to(tmp_path), "all").train) == 4
    (root / "realiad_1024").rename(root / "realiad_256")
    assert len(read_real_iad(root, "all", images="realiad_256").train) == 4
    refused("no category in this folder; none of .*has a list", read_real_iad, root, "all", images="realiad_jsons")
    refused("realiad_jsons_no: no CATEGORY.json", read_real_iad, root, "all", "realiad_256", "realiad_jsons_no")
    content = json.loads(file.read_text())
    noisy = content | {"train": content["train"] + content["test"][2:3], "test": content["test"][3:]}
    file.write_text(json.dumps(noisy))
    data = read_real_iad(root, "all", images="realiad_256")
    assert len(data.train) == 4
    assert "realiad_jsons: 1 defective training images left out" in data.notes
    for faulty, message in (
        ({"train": content["test"][2:3], "test": []}, "realiad_jsons: no normal training images of 'audiojack'"),
        ({"test": content["train"][:1]}, r"test\[0\]: .* is in .* train\[0\] already"),
        ({"test": [{"anomaly_class": "AK", "image_path": "x.jpg"}]}, r"test\[0\]: needs anomaly_class and image_path"),
        ({"test": [{"anomaly_class": "OK", "image_path": "../../x.jpg"}]}, r"test\[0\]: .*leads out of"),
        ({"test": 3}, "not Real-IAD's lists train and test .TypeError"),
    ):
        file.write_text(json.dumps(content | faulty))
        refused(message, read_real_iad, root, "all", images="realiad_256")
    file.write_text("{")
    refused("audiojack.json: not Real-IAD's lists", read_real_iad, root, "all", images="realiad_256")


def test_real_iad_totals(tmp_path):
    """Each list is one image for all 30 categories: the totals differ from the official ones."""
    for name in CATEGORIES:
        picture = save_image(tmp_path / "realiad_1024" / name / "a.jpg", 8)
        shutil.copy(picture, picture.with_name("b.jpg"))
        lists = {
            part: [{"anomaly_class": "OK", "image_path": f"{x}.jpg"}] for part, x in (("train", "a"), ("test", "b"))
        }
        (tmp_path / "realiad_jsons").mkdir(exist_ok=True)
        (tmp_path / "realiad_jsons" / f"{name}.json").write_text(json.dumps(lists))
    assert read_real_iad(tmp_path, "all").notes == [
        "Real-IAD: 30 train images, officially 36465; 30 good test images, officially 63256; 0 defective test images, "
        "officially 51329"
    ]


def test_kolektor_faults(roots, tmp_path):
    root = shutil.copytree(roots["kolektor_sdd"], tmp_path / "sdd")
    shutil.copy(root / "kos01" / "Part0.jpg", root / "kos01" / "Part0.png")
    refused("Part0.png: a second file for Part0.jpg; remove one", read_kolektor_sdd, root, "all")
    refused("no category 'kos01'", read_kolektor_sdd, roots["kolektor_sdd"], "kos01")
    for folder in root.iterdir():
        if folder.name != "kos01":
            shutil.rmtree(folder)
    (root / "kos01" / "Part0.png").unlink()
    for mask in root.glob("kos01/*.bmp"):
        save_mask(mask)
    refused("kos01: no normal training images, which have an empty mask", read_kolektor_sdd, root, "all")


@pytest.mark.parametrize("name", ["mvtec_ad_2", "mvtec_loco", "btad"])
def test_another_test_set_in_the_own_layout(name, roots, tmp_path):
    """As evaluate reads it, with or without training images."""
    root = shutil.copytree(roots[name], tmp_path / name)
    categories, _, kinds, _ = FOUND[name]
    shutil.rmtree(root / categories[0] / "train")
    data = read_test_set(root, [categories[0]], like=name)
    assert data.train == []
    assert len(data.test) == sum(kinds.values())
    assert bool(data.test[-1].saturations) == (name == "mvtec_loco")
    assert len(read_test_set(root / categories[0], [categories[0]], like=name).test) == len(data.test)
    refused(
        "none of the run's categories, x; name its folder like one, and put test images into",
        read_test_set,
        root,
        ["x"],
    )
    refused(
        "name its folder like one, and put test images into CATEGORY/test/good",
        read_test_set,
        roots["kolektor_sdd"],
        ["kolektor_sdd"],
    )


# --- splits and settings ---


@ALL
def test_splits_and_settings(name, roots):
    """Shots, long tails, unified and single; batches with images of all categories."""
    categories, train, kinds, _ = FOUND[name]

    def module(category, split):
        data = AnomalyDataModule(READERS[name], roots[name], category, name, 32, 2, 4, split=split)
        data.setup()
        return data

    data = module("all", functools.partial(splits.few_shots, shots=2))
    assert data.train_counts == dict.fromkeys(categories, 2)
    counts = {"good": kinds["good"], "defective": sum(kinds.values()) - kinds["good"]}
    assert list(data.test_counts.values()) == [counts] * len(categories)
    assert data.has_masks == dict.fromkeys(categories, True)
    assert {int(c) for batch in data.train_dataloader() for c in batch["category"]} == set(range(len(categories)))
    batches = list(data.test_dataloader())
    assert sum(
        int(mask.any()) for batch in batches for mask in batch["gt_mask" if "gt_mask" in batch else "mask"]
    ) == sum(s.mask is not None for s in data.test_samples)
    data = module("all", functools.partial(splits.long_tail, profile="exp", imbalance=2))
    smallest = train // 2 if len(categories) > 1 else train
    assert sorted(data.train_counts.values()) == sorted([smallest, *[train] * (len(categories) - 1)])
    data = module(categories[:1], splits.full)
    assert data.categories == categories[:1]
    assert data.train_counts == {categories[0]: train}
