"""Images in any folders, and images that a table lists: equal to the MVTec layout of the same files."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.data.own_folders import common_root, read_own_folders
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.samples import load_mask
from anomalib_lite.data.tables import COLUMNS, read_table
from anomalib_lite.errors import UserError
from tests.helpers.image_trees import make_mvtec, save_image, save_mask
from tests.unit import test_readers


def picked(samples):
    return [(s.path.name, s.defect, s.label, None if s.mask is None else s.mask.name) for s in samples]


@pytest.fixture
def phone(tmp_path):
    """ok/, ng/{crack,hole}/, and masks of all kinds of names in one flat folder."""
    for i in range(10):
        save_image(tmp_path / "ok" / f"a{i}.png", seed=i)
    for i, (kind, suffix) in enumerate((("crack", "_mask"), ("crack", "_gt"), ("hole", ""))):
        save_image(tmp_path / "ng" / kind / f"b{i}.png", seed=100 + i)
        save_mask(tmp_path / "masks" / f"b{i}{suffix}.png")
    return tmp_path


def places(root: Path, **more):
    return {"normal": f"{root}/ok", "abnormal": f"{root}/ng", "masks": f"{root}/masks"} | more


def test_folders(phone):
    data = read_own_folders("all", **places(phone))
    assert data.root == phone
    assert {s.category for s in [*data.train, *data.test]} == {phone.name}
    assert len(data.train) == 8
    assert picked(data.test[2:]) == [
        ("b0.png", "crack", 1, "b0_mask.png"),
        ("b1.png", "crack", 1, "b1_gt.png"),
        ("b2.png", "hole", 1, "b2.png"),
    ]
    drawn = [s.path for s in data.test[:2]]
    assert not {s.path for s in data.train} & set(drawn)
    assert data.notes == ["data.test_fraction=0.2: 2 of 10 normal images are test images, drawn with data.test_seed=0"]
    assert [s.path for s in read_own_folders("x", **places(phone)).test[:2]] == drawn
    assert [s.path for s in read_own_folders("x", **places(phone), test_seed=3).test[:2]] != drawn


def test_places_beside_the_working_folder(phone, monkeypatch):
    monkeypatch.chdir(phone / "masks")
    (phone / "ok").rename(phone / "kept")
    (phone / "ok").symlink_to("kept")  # places are called as the link
    data = read_own_folders("all", normal="../ok", abnormal="../n*", masks=".")
    assert data == read_own_folders("all", **places(phone.resolve()))


def test_lists_patterns_and_named_test_images(phone):
    save_image(phone / "more" / "deep" / "er" / "c.png", seed=50)
    shutil.move(phone / "ok" / "a9.png", phone / "fresh.png")
    named = places(phone, normal=[f"{phone}/ok/a[0-3].png", f"{phone}/mo*"], normal_test=f"{phone}/fresh.png")
    data = read_own_folders(["part"], **named)
    assert picked(data.train) == [(f"{n}.png", "good", 0, None) for n in ("c", "a0", "a1", "a2", "a3")]
    assert picked(data.test)[0] == ("fresh.png", "good", 0, None)
    assert data.train[0].category == "part"
    assert common_root(*named.values()) == data.root == phone
    alone = read_own_folders("all", f"{phone}/ok")
    assert (len(alone.train), alone.test) == (9, [])
    assert "nothing can be measured" in alone.notes[0]


def test_dark_masks(phone):
    for kind, values in (("b0_mask", (255, 0)), ("b1_gt", (1, 0)), ("b2", (200, 40))):
        mask = np.full((32, 32), values[0], np.uint8)
        mask[3:9, 3:9] = values[1]
        Image.fromarray(mask).save(phone / "masks" / f"{kind}.png")
    data = read_own_folders("all", **places(phone), mask_defect="dark")
    right = np.zeros((32, 32), bool)
    right[3:9, 3:9] = True
    for sample in data.test[2:]:
        assert sample.mask is not None
        assert (load_mask(sample.mask, sample.dark_mask) == right).all()


def test_as_the_mvtec_layout(tmp_path):
    """The same files by the layout, by folders and by a table."""
    folder = make_mvtec(tmp_path, "bottle", defects={"broken": 2, "worn": 2})
    with_layout = read_folder(tmp_path, "bottle")
    by_folders = read_folder(
        None,
        "bottle",
        normal=str(folder / "train"),
        normal_test=str(folder / "test" / "good"),
        abnormal=[str(folder / "test" / "broken"), str(folder / "test" / "worn")],
        masks=str(folder / "ground_truth"),
    )
    rows = [(s, "train") for s in with_layout.train] + [(s, "test") for s in with_layout.test]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s, split in rows:
            mask = s.mask.relative_to(tmp_path) if s.mask else ""
            writer.writerow([s.path.relative_to(tmp_path), s.category, s.defect, split, mask])
    by_table = read_table(None, "all", tmp_path / "list.csv")
    for data in (by_folders, by_table):
        assert set(data.train) == set(with_layout.train)
        assert set(data.test) == set(with_layout.test)


def refused(message, *arguments, **options):
    test_readers.refused(message, read_folder, *arguments, **options)


def test_faulty_folders(phone):
    right = places(phone)
    refused("data.root=x: data.normal names", "x", "all", **right)
    refused("data.abnormal=x: goes with data.normal=DIR", None, "all", abnormal="x")
    refused(r"data.category=\['a', 'b'\]: data.normal describes one", None, ["a", "b"], **right)
    refused("data.normal=/none: no such folder", None, "all", **right | {"normal": "/none"})
    refused(r"data.masks=.*/m\*/\*.gif: no such folder", None, "all", **right | {"masks": f"{phone}/m*/*.gif"})
    refused("a0.png: data.normal names this image twice", None, "all", **right | {"normal": [f"{phone}/ok"] * 2})
    (phone / "again").symlink_to(phone / "ok")
    refused("data.normal and data.abnormal both", None, "all", normal=f"{phone}/ok", abnormal=f"{phone}/again")
    refused("hole/b2.png: data.normal and data.abn", None, "all", normal=f"{phone}/ng", abnormal=f"{phone}/ng/hole")
    refused(
        "b0_mask.png: a mask for no image|data.masks contains", None, "all", **right | {"abnormal": f"{phone}/ng/hole"}
    )
    refused(
        "b0.png: no mask for this defective image; add b0_mask.png to data.masks",
        None,
        "all",
        **right | {"masks": f"{phone}/masks/b2.png"},
    )
    (phone / "masks" / "b0_mask.png").rename(phone / "masks" / "seg_b0.png")
    refused("found seg_b0.png in data.masks; rename it to b0_mask.png", None, "all", **right)
    (phone / "masks" / "seg_b0.png").rename(phone / "masks" / "b0_mask.png")
    refused("a0.png: data.masks contains this image", None, "all", **right | {"masks": f"{phone}/ok"})
    refused("1 image is too few", None, "all", **right | {"normal": f"{phone}/ok/a0.png"})
    shutil.copy(phone / "ok" / "a3.png", phone / "ng" / "hole" / "z.png")
    refused("z.png: the same picture as .*a3.png, which is in data.normal", None, "all", **right | {"masks": None})
    shutil.move(phone / "ng" / "hole" / "z.png", phone / "ng" / "b.png")
    (phone / "ng" / "b.png").write_bytes((phone / "masks" / "b2.png").read_bytes())
    (phone / "ng" / "b.png").rename(phone / "ng" / "hole" / "b2_mask.png")
    refused("b2_mask.png: it seems to be a mask beside", None, "all", **right | {"masks": None})
    (phone / "ng" / "hole" / "b2_mask.png").rename(phone / "masks" / "b2_mask.png")
    refused("b2.png: two masks", None, "all", **right)
    (phone / "ng" / "hole").rename(phone / "ng" / "OK")
    refused("OK: its images would count as defective", None, "all", **right)
    (phone / "ok" / "dead.png").symlink_to("nowhere")
    refused("dead.png: a link to a file that is missing", None, "all", **right)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,category,label,split", "a.png,c,good,train", "its header must be path,category,label,split,mask"),
        ("", "a.png,c,good,val,", "line 2: split='val' must be train or test"),
        ("", "a.png,c,,train,", "line 2: the label is empty"),
        ("", ",c,good,train,", "line 2: the path is empty"),
        ("", "b.png,c,good,train,", "b.png is missing"),
        ("", "a.png,c,good,train,a.png", "a normal image with a mask"),
        ("", "a.png,c,crack,train,", "no normal training images of 'c'"),
        ("", "a.png,c,good,train", "line 2: 5 fields are needed"),
        ("", "a.png,c,good,train,\na.png,c,bad,test,", "line 3: .*a.png is in .* line 2 already"),
        ("", "../x.png,c,good,train,", "line 2: ../x.png leads out of .*data.root"),
        ("", "/tmp/x.png,c,good,train,", "line 2: /tmp/x.png leads out of .*data.root"),
    ],
)
def test_faulty_tables(header, row, message, tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(f"{header or ','.join(COLUMNS)}\n{row}\n")
    with pytest.raises(UserError, match=message):
        read_table(None, "all", str(tmp_path / "list.csv"))


def test_table_with_masks_of_some_defective_images(tmp_path):
    """The first row without a mask is named, if its own category has masks."""
    for i in range(4):
        save_image(tmp_path / f"{i}.png", seed=i)
    save_mask(tmp_path / "m.png")
    rows = ["0.png,c,good,train,", "1.png,c,bad,test,m.png", "2.png,d,good,train,", "3.png,d,bad,test,"]
    table = tmp_path / "list.csv"
    table.write_text("\n".join([",".join(COLUMNS), *rows]))
    assert "has no mask" not in " ".join(read_table(None, "all", table).notes)
    table.write_text(table.read_text().replace(",d,", ",c,"))
    data = read_table(None, "all", table)
    assert [s.mask for s in data.test] == [tmp_path / "m.png", None]
    assert f"{table} line 5: {tmp_path / '3.png'} has no mask, so 'c' has no pixel metrics; add it" in data.notes


def test_table_labels_and_notes(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", seed=i)
    rows = ["0.png,c,OK,train,,1", "1.png,c,crack,Train,,1", "2.png,c,0,TEST,,1", "3.png,c,1,test,,2"]
    (tmp_path / "list.csv").write_text("\n".join(["path,category,label,split,mask,camera", *rows]))
    base = tmp_path / "cwd" / ".."  # as of data.table=../list.csv
    (tmp_path / "cwd").mkdir()
    data = read_table(None, "c", base / "list.csv")
    assert picked(data.train) == [("0.png", "good", 0, None)]
    assert picked(data.test) == [("2.png", "good", 0, None), ("3.png", "1", 1, None)]
    assert data.notes[0] == "list.csv: 1 defective training images left out"
    assert data.notes[-1] == "list.csv: columns that are not used: camera"
    rows = [f"{tmp_path.resolve()}/{row}" for row in rows]
    (tmp_path / "list.csv").write_text("\n".join(["path,category,label,split,mask,camera", *rows]))
    for root in (None, base, base / "cwd" / ".."):
        assert read_table(root, "c", base / "list.csv") == data
