import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.data.integrity import check
from anomalib_lite.data.mvtec_layout import choose
from anomalib_lite.data.readers import MVTEC, VISA, read_folder, read_mvtec, read_visa
from anomalib_lite.data.samples import load_mask, load_rgb
from anomalib_lite.errors import UserError
from tests.helpers.image_trees import make_mvtec, make_visa, save_image, save_mask


def refused(pattern, call, *args, **options):
    """The call raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=pattern) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_a_name_in_brackets():
    """data.category=[x] is a list with the name x, also where a folder is called [x]."""
    pattern = r"no category 'x'; for the folder \[x\] give quotes too: 'data.category=\"\[x\]\"'$"
    refused(pattern, choose, ["x"], ["[x]"], Path("root"))
    assert choose("[x]", ["[x]"], Path("root")) == ["[x]"]


def mask_of(sample):
    assert sample.mask is not None
    return sample.mask


# --- the MVTec layout ---


def test_official_totals():
    assert np.sum(list(MVTEC.values()), axis=0).tolist() == [3629, 467, 1258]
    assert np.sum(list(VISA.values()), axis=0).tolist() == [8659, 962, 1200]


def test_mvtec_in_order_with_notes(tmp_path):
    for category in ("wood", "bottle"):
        make_mvtec(tmp_path, category, defects={"scratch": 2, "broken": 1})
    data = read_mvtec(tmp_path, ["wood", "bottle"])
    assert [s.category for s in data.train] == ["wood"] * 6 + ["bottle"] * 6
    assert [s.defect for s in data.test[:6]] == ["broken", "good", "good", "good", "scratch", "scratch"]
    assert [s.label for s in data.test[:6]] == [1, 0, 0, 0, 1, 1]
    assert all(s.path.is_absolute() for s in data.train + data.test)
    assert "bottle: 6 train images, officially 209; 3 good test images, officially 20; " in data.notes[1]
    both = read_mvtec(tmp_path, "all")
    assert [s.category for s in both.train] == ["bottle"] * 6 + ["wood"] * 6
    assert both.notes[-1].startswith("13 of MVTec AD's 15 categories are not on disk: cable, ")


def test_mvtec_all_passes_over_other_folders(tmp_path):
    make_mvtec(tmp_path, "bottle")
    make_mvtec(tmp_path, "widget")
    assert {s.category for s in read_mvtec(tmp_path, "all").train} == {"bottle"}
    assert {s.category for s in read_folder(tmp_path, "all").train} == {"bottle", "widget"}
    refused("no category 'widget'.*data=folder reads", read_mvtec, tmp_path, "widget")


def test_clutter_and_other_files(tmp_path):
    """What systems leave behind is ignored; a note counts other files."""
    folder = make_mvtec(tmp_path)
    clean = read_folder(tmp_path, "bottle")
    save_image(folder / "test" / ".ipynb_checkpoints" / "000.png")
    save_image(folder / "train" / ".cache" / "000.png")
    save_image(folder / "train" / "good" / "._000.png")
    (folder / "train" / "empty").mkdir()
    save_image(tmp_path / ".hidden" / "train" / "good" / "000.png")
    for name in ("train/good/Thumbs.db", "test/broken/readme.txt", "license.txt", "ground_truth/broken/notes.csv"):
        (folder / name).write_text("no image")
    (tmp_path / "papers").mkdir()
    data = read_folder(tmp_path, "all")
    assert (data.train, data.test) == (clean.train, clean.test)
    assert data.notes == [f"bottle: 2 files or folders are not used (first: {folder / 'test/broken/readme.txt'})"]


def test_extensions_in_any_case(tmp_path):
    folder = make_mvtec(tmp_path, defects={})
    for i, extension in enumerate(("JPG", "Jpeg", "bmp", "TIF", "tiff", "WebP", "jfif", "GIF", "ppm", "jp2", "tga")):
        save_image(folder / "train" / "good" / f"x{i}.{extension}")
    assert len(read_folder(tmp_path, "bottle").train) == 17


def nested(part):
    return lambda folder: save_image(folder / part / "day2" / "a.png")


def dead_link(part):
    return lambda folder: (folder / part).symlink_to("/not/mounted/x.png")


def written(part, content=b"text"):
    def write(folder):
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).write_bytes(content)

    return write


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


PASSED_OVER = {
    "nested training image": (nested("train/good"), r"train/good/day2: images in a folder below .*train/good are not"),
    "nested test image": (nested("test/broken"), r"test/broken/day2: images in a folder below .* move them into"),
    "nested mask": (nested("ground_truth/broken"), r"ground_truth/broken/day2: images in a folder below"),
    "linked folder": (
        lambda folder: (folder / "train/good/day1").symlink_to(folder / "test/good"),
        r"train/good/day1: images in a folder below",
    ),
    "dead link": (dead_link("train/good/009.png"), r"train/good/009.png: a link to a file that is missing; restore"),
    "dead link to a mask": (dead_link("ground_truth/broken/x.png"), "broken/x.png: a link to a file that is missing"),
    "video": (
        written("train/good/a.MOV"),
        r"train/good/a.MOV: a video is not read; save its frames as images, or move",
    ),
    "camera's format": (written("train/good/a.CR2"), r"train/good/a.CR2: this kind of image is not read; convert it"),
    "iPhone's format": (written("test/good/a.heic"), r"test/good/a.heic: this kind of image is not read"),
    "image without suffix": (
        lambda folder: rename("train/good/000.png", "train/good/000")(folder),
        r"train/good/000: this kind of image is not read",
    ),
    "loose mask": (
        lambda folder: save_mask(folder / "ground_truth" / "a.png"),
        "masks belong in .*ground_truth/DEFECT",
    ),
    "test/ok": (
        rename("test/broken", "test/ok"),
        r"test/ok: its images would count as defective, .*rename it to 'good'",
    ),
    "test/Good images": (rename("test/broken", "test/Good images"), r"test/Good images: its images would count"),
    **{
        f"test/{name}": (rename("test/good", f"test/{name}"), f"test/{name}: its images would count")
        for name in ("class_ok", "without_defects", "正常")
    },
    "test/no_defect": (rename("test/good", "test/no_defect"), r"test/no_defect: its images would count"),
    "train/OK": (rename("train/good", "train/OK"), r"train/OK: the folder of normal images must be called 'good'"),
    "Ground Truth": (rename("ground_truth", "Ground Truth"), r"Ground Truth: the folder must be called 'ground_truth'"),
    "Test": (rename("test", "Test"), r"Test: the folder must be called 'test'; rename it"),
    "unreadable folder": (
        lambda folder: (folder / "train/good/loop").symlink_to(folder / "train/good/loop"),
        r"loop: a link to a file that is missing",
    ),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_images_that_would_be_passed_over(case, tmp_path):
    spoil, pattern = PASSED_OVER[case]
    spoil(make_mvtec(tmp_path))
    refused(pattern, read_folder, tmp_path, "all")


def test_defects_whose_names_are_near_to_normal(tmp_path):
    names = ["not_ok", "nok", "no good", "abnormal", "ok_scratch", "defect", "0", "bad"]
    make_mvtec(tmp_path, defects=dict.fromkeys(names, 1))
    assert {s.defect for s in read_folder(tmp_path, "all").test if s.label} == set(names)


def test_notes_on_what_is_not_read(tmp_path):
    """Folders beside those of the layout, masks of good images, categories that are none."""
    folder = make_mvtec(tmp_path)
    save_image(folder / "validation" / "good" / "000.png")
    save_mask(folder / "ground_truth" / "good" / "000.png")
    save_image(tmp_path / "cap" / "Train" / "good" / "000.png")
    save_image(tmp_path / "preview.png")
    assert read_folder(tmp_path, "all").notes == [
        f"bottle: 2 files or folders are not used (first: {folder / 'validation'})",
        "1 folders with images are not read, having neither train nor test in them: cap",
        f"1 files beside the categories are not read (first: {tmp_path / 'preview.png'})",
    ]
    assert len(read_folder(tmp_path, "bottle").notes) == 1
    assert "1 folders with images are not read, being no category of MVTec AD: cap" in read_mvtec(tmp_path, "all").notes


@pytest.mark.parametrize("suffix", ["_mask", ""])
def test_masks_are_paired_by_name(tmp_path, suffix):
    """Sorted positions disagree: "a1" sorts before "a10" and after it once "_mask" is appended; extensions differ."""
    folder = make_mvtec(tmp_path, defects={})
    names = ["a1", "a10", "a1-b", "B", "a_2"]
    for name in names:
        save_image(folder / "test" / "broken" / f"{name}.jpg")
        save_mask(folder / "ground_truth" / "broken" / f"{name}{suffix}.PNG")
    test = [s for s in read_folder(tmp_path, "bottle").test if s.label]
    assert {s.path.stem: mask_of(s).stem for s in test} == {name: name + suffix for name in names}


def test_folder_may_be_the_category_itself(tmp_path):
    data = read_folder(make_mvtec(tmp_path, "widget"), "all")
    assert {s.category for s in data.train + data.test} == {"widget"}
    assert data.root.name == "widget"


def test_folder_without_ground_truth(tmp_path):
    make_mvtec(tmp_path, masks=False)
    data = read_folder(tmp_path, "bottle")
    assert {s.mask for s in data.test} == {None}
    assert data.notes == ["bottle: no ground_truth, pixel metrics are left out"]


def test_folder_with_little_to_test(tmp_path):
    make_mvtec(tmp_path, "a", good=0)
    make_mvtec(tmp_path, "b", good=0, defects={})
    assert read_folder(tmp_path, "all").notes == [
        "a: no good test images, image AUROC can't be computed",
        "b: no test images, nothing can be measured",
    ]


def test_masks_of_good_images_are_not_looked_at(tmp_path):
    folder = make_mvtec(tmp_path)
    save_mask(folder / "ground_truth" / "good" / "000.png")
    assert {s.mask for s in read_folder(tmp_path, "all").test if s.label == 0} == {None}


def test_faulty_roots_and_categories(tmp_path):
    folder = make_mvtec(tmp_path)
    make_mvtec(tmp_path, "wood")
    for read in (read_mvtec, read_folder):
        refused(r"data\.root is not set.*data\.root=DIR", read, None, "bottle")
        refused("nowhere: no such folder; set data.root", read, tmp_path / "nowhere", "bottle")
        refused(
            r"no category 'botle'; did you mean 'bottle'\? \(data.category: bottle, wood\)", read, tmp_path, "botle"
        )
        refused(r"data.category names 'wood' 2 times", read, tmp_path, ["wood", "bottle", "wood"])
        refused(r"data.category is empty", read, tmp_path, [])
        refused(r"data.category is empty", read, tmp_path, "")
        refused(r"test: no category in this folder", read, folder / "test", "all")
    refused(r"it seems to be a category itself, set data.root to", read_mvtec, folder, "bottle")


def test_train_holds_good_images_only(tmp_path):
    folder = make_mvtec(tmp_path)
    save_image(folder / "train" / "000.png")
    refused(r"train/000.png: .*belong in .*train/good", read_folder, tmp_path, "all")
    (folder / "train" / "000.png").unlink()
    save_image(folder / "train" / "broken" / "000.png")
    refused(r"train/broken: train may hold only the folder 'good'", read_folder, tmp_path, "all")
    shutil.rmtree(folder / "train" / "broken")
    for path in (folder / "train" / "good").iterdir():
        path.unlink()
    refused(r"train/good: no training images .*put normal ones there", read_mvtec, tmp_path, "bottle")


def test_images_loose_in_test(tmp_path):
    save_image(make_mvtec(tmp_path) / "test" / "000.png")
    refused(r"test/000.png: test images belong in", read_folder, tmp_path, "all")


def test_faulty_masks(tmp_path):
    folder = make_mvtec(tmp_path)
    masks = folder / "ground_truth" / "broken"
    save_mask(masks / "001.png")
    refused(r"test/broken/001.png: two masks, .*001_mask.png and .*001.png", read_folder, tmp_path, "all")
    (masks / "001.png").unlink()
    save_mask(masks / "stray_mask.png")
    refused(r"broken/stray_mask.png: a mask for no image", read_folder, tmp_path, "all")
    (masks / "stray_mask.png").unlink()
    save_mask(folder / "ground_truth" / "torn" / "000_mask.png")
    refused(r"torn/000_mask.png: a mask for no image", read_folder, tmp_path, "all")
    shutil.rmtree(folder / "ground_truth" / "torn")
    save_image(folder / "test" / "broken" / "001.jpg")
    refused(r"001_mask.png: one mask for 001.jpg and 001.png", read_folder, tmp_path, "all")
    (folder / "test" / "broken" / "001.jpg").unlink()
    (masks / "002_mask.png").unlink()
    refused(
        r"test/broken/002.png: no mask for this defective image; add .*002_mask.png", read_mvtec, tmp_path, "bottle"
    )
    (masks / "000_mask.png").rename(masks / "000_seg.png")
    refused(
        r"000.png: no mask .*; found 000_seg.png in .*/broken; rename it to 000_mask.png", read_mvtec, tmp_path, "all"
    )
    (masks / "000_seg.png").rename(masks / "x.png")
    refused(r"000.png: no mask .*; add 000_mask.png .*/broken \(x.png in it belongs to no", read_mvtec, tmp_path, "all")
    shutil.rmtree(masks)
    refused(r"test/broken/000.png: no mask", read_mvtec, tmp_path, "bottle")


# --- VisA ---


def test_visa_raw(tmp_path):
    make_visa(tmp_path)
    make_visa(tmp_path, "cashew", train=3, others=False)
    data = read_visa(tmp_path, ["cashew", "candle"])
    assert [s.category for s in data.train] == ["cashew"] * 3 + ["candle"] * 4
    assert [(s.defect, s.label) for s in data.test[:4]] == [("good", 0)] * 2 + [("bad", 1)] * 2
    assert [mask_of(s).name for s in data.test[2:4]] == ["000.png", "001.png"]
    assert load_mask(mask_of(data.test[2])).sum() == 64
    assert "candle: 4 train images, officially 900" in data.notes[1]
    extra = save_image(tmp_path / "candle/Data/Images/Normal/extra.JPG")
    notes = read_visa(tmp_path, ["cashew", "candle"]).notes
    assert f"candle: 1 images are not in 1cls.csv (first: {extra})" in notes
    assert read_visa(tmp_path, "all").notes[-1].startswith("10 of VisA's 12 categories are not on disk: ")


@pytest.mark.parametrize("below", ["", "1cls"])
def test_visa_converted(tmp_path, below):
    make_mvtec(tmp_path / below, "capsules", defects={"bad": 2}, suffix="")
    data = read_visa(tmp_path, "capsules")
    assert [mask_of(s).name for s in data.test if s.label] == ["000.png", "001.png"]
    assert "capsules: 6 train images, officially 542" in data.notes[0]


def test_visa_with_another_table(tmp_path):
    table = make_visa(tmp_path, train=3)
    text = table.read_text().replace("candle,test,anomaly", "candle,train,anomaly", 1)
    table.with_name("2cls_fewshot.csv").write_text(text)
    data = read_visa(tmp_path, "candle", split_csv="2cls_fewshot.csv")
    assert len(data.train) == 3
    assert data.notes == ["2cls_fewshot.csv: 1 defective training images left out"]


def test_faulty_visa(tmp_path):
    refused("neither VisA's raw layout .split_csv/1cls.csv is missing", read_visa, tmp_path, "candle")
    table = make_visa(tmp_path)
    text = table.read_text()
    refused("no category 'candel'; did you mean 'candle'", read_visa, tmp_path, "candel")
    refused("no category 'pcb1'", read_visa, tmp_path, "pcb1")

    def broken(pattern, old, new):
        table.write_text(text.replace(old, new))
        refused(pattern, read_visa, tmp_path, "candle")

    broken(r"1cls.csv: its header must be object,split,label,image,mask, not object,set,", "split,label", "set,label")
    broken(
        r"1cls.csv line 2: split must be train or test",
        "candle,train,normal,candle/Data/Images/Normal/0000",
        "candle,trian,normal,x",
    )
    broken(r"1cls.csv line 3: .*Normal/9.JPG is missing; restore", "Normal/0001.JPG", "Normal/9.JPG")
    broken(r"1cls.csv line 8: .*Anomaly/9.png is missing", "Anomaly/000.png", "Anomaly/9.png")
    broken(r"1cls.csv line 8: the mask of a row may not be empty", "candle/Data/Masks/Anomaly/000.png", "")
    broken(r"1cls.csv line 4: 5 fields are needed", "Normal/0002.JPG,", "Normal/0002.JPG")
    broken(
        r"1cls.csv line 2: 'candel' is no object of VisA",
        "candle,train,normal,candle/Data/Images/Normal/0000",
        "candel,train,normal,candle/Data/Images/Normal/0000",
    )
    broken(r"1cls.csv line 3: .*0000.JPG is in .* line 2 already; remove", "Normal/0001.JPG", "Normal/0000.JPG")
    broken(r"1cls.csv line 2: a normal image with a mask", "Normal/0000.JPG,", "Normal/0000.JPG,x.png")
    broken(r"1cls.csv line 5: .*leads out of", "candle/Data/Images/Normal/0003.JPG", "../x.JPG")
    table.write_bytes(b"object,split\xff\xfe")
    refused("1cls.csv: not a CSV in UTF-8", read_visa, tmp_path, "candle")
    table.write_text("object,split,label,image,mask\n")
    refused("1cls.csv: no normal training images of 'candle'", read_visa, tmp_path, "candle")


# --- files ---


def png16(path, values):
    """A 16-bit gray PNG, written by hand: Pillow's versions differ in how they do it."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_load_rgb_of_every_mode(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    alpha = Image.fromarray(rgb[..., 0])
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    gray_alpha = image.convert("L")
    gray_alpha.putalpha(alpha)
    palette = image.quantize(16)
    cases = {
        "rgb.png": (image, rgb),
        "rgba.png": (with_alpha, rgb),
        "l.png": (image.convert("L"), gray[..., None]),
        "la.png": (gray_alpha, gray[..., None]),
        "p.png": (palette, np.asarray(palette.convert("RGB"))),
        "1.png": (image.convert("1"), np.asarray(image.convert("1"))[..., None] * 255),
        "cmyk.tif": (image.convert("CMYK"), np.asarray(image.convert("CMYK").convert("RGB"))),
        "f.tif": (Image.fromarray(gray.astype(np.float32) / 255), gray[..., None]),
        "f255.tif": (Image.fromarray(gray.astype(np.float32)), gray[..., None]),
    }
    for name, (picture, wanted) in cases.items():
        picture.save(tmp_path / name)
        loaded = load_rgb(tmp_path / name)
        assert loaded.shape == (9, 7, 3), name
        assert loaded.dtype == np.uint8, name
        assert (loaded == wanted).all(), name
    png16(tmp_path / "16.png", np.array([[0, 257, 25700, 65535, 300]], np.uint16))
    assert load_rgb(tmp_path / "16.png")[0, :, 1].tolist() == [0, 1, 100, 255, 1]


def test_load_mask_of_every_mode(tmp_path):
    wanted = np.zeros((6, 8), bool)
    wanted[2:4, 3:7] = True
    ones = Image.fromarray(wanted.astype(np.uint8))  # 1 of 255: looks black
    blue = Image.fromarray(wanted[..., None] * np.array([0, 0, 1], np.uint8))
    opaque = Image.fromarray(wanted[..., None] * np.array([9, 0, 0], np.uint8))
    opaque.putalpha(255)
    gray_opaque = ones.copy()
    gray_opaque.putalpha(255)
    masks = {
        "l": ones,
        "rgb": blue,
        "rgba": opaque,
        "la": gray_opaque,
        "p": blue.quantize(4),
        "1": Image.fromarray(wanted),
    }
    for name, picture in masks.items():
        picture.save(tmp_path / f"{name}.png")
        assert (load_mask(tmp_path / f"{name}.png") == wanted).all(), name
    png16(tmp_path / "16.png", wanted.astype(np.uint16))
    assert (load_mask(tmp_path / "16.png") == wanted).all()
    Image.fromarray(wanted.astype(np.float32) / 1000).save(tmp_path / "f.tif")
    assert (load_mask(tmp_path / "f.tif") == wanted).all()


@pytest.mark.parametrize("thorough", [False, True])
def test_check_names_the_first_damaged_file(tmp_path, thorough):
    folder = make_mvtec(tmp_path)
    data = read_folder(tmp_path, "all")
    assert check(data, thorough)[1] == []
    mask = folder / "ground_truth" / "broken" / "001_mask.png"
    save_mask(mask, size=16)
    refused(r"001_mask.png: the mask is 16x16, its image 001.png 32x32; give", check, data, thorough)
    mask.write_bytes(b"")
    refused(r"001_mask.png: the file is empty; copy it again", check, data, thorough)
    (folder / "test" / "broken" / "000.png").write_text("hello")
    refused(r"test/broken/000.png: can't be decoded as an image \(its content is no image\)", check, data, thorough)
    (folder / "train" / "good" / "005.png").unlink()
    refused(r"train/good/005.png: no such file", check, data, thorough)
    whole = folder / "train" / "good" / "004.png"
    whole.write_bytes(whole.read_bytes()[:-200])
    refused(r"train/good/004.png: can't be decoded as an image \(.*trunc.*replace or remove", check, data, thorough)


def test_check_of_other_formats(tmp_path):
    folder = make_mvtec(tmp_path, train=1, defects={}) / "train" / "good"
    for name in ("a.jpg", "b.bmp", "c.webp", "d.tif"):
        save_image(folder / name, 64)
    padded = save_image(folder / "e.jpg", 64)
    padded.write_bytes(padded.read_bytes() + bytes(500))  # complete, with something after its end
    data = read_folder(tmp_path, "all")
    assert check(data)[1] == []
    for name in ("d.tif", "c.webp", "b.bmp", "a.jpg"):
        whole = folder / name
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        refused(f"train/good/{name}: can't be decoded", check, data)


def test_thorough_check_notes(tmp_path):
    folder = make_mvtec(tmp_path)
    save_mask(folder / "ground_truth" / "broken" / "001_mask.png", value=0)
    save_image(folder / "train" / "good" / "005.png", size=48)
    with Image.open(folder / "train" / "good" / "002.png") as image:
        image.save(folder / "test" / "good" / "001.png", compress_level=1)  # other bytes, the same pixels
    data = read_folder(tmp_path, "all")
    assert check(data)[1] == []
    assert check(data, thorough=True)[1] == [
        "bottle: 1 of 3 masks are empty (first: broken/001_mask.png)",
        "bottle: images of 2 sizes: 32x32 (11), 48x48 (1)",
        "1 test images are identical to training images (first: bottle good/001.png equals train 002.png)",
    ]
