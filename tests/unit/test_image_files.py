"""What a file holds, and what is read of it: ranges of values, masks, orientation."""

import functools
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.image_files import decoding, read_header
from anomalib_lite.data.integrity import check
from anomalib_lite.data.masks import PIXELS, evenly_spread, read_mask
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.samples import load_mask, load_rgb
from anomalib_lite.errors import UserError
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import python


def module(root: Path, **options) -> AnomalyDataModule:
    data = AnomalyDataModule(reader=read_folder, root=root, image_size=16, **options)
    data.setup()
    return data


def make(root: Path, pictures, save, suffix: str = ".tif") -> Path:
    """A category with the first pictures for training, the last one for testing."""
    for i, picture in enumerate(pictures):
        path = root / "part" / ("train" if i < len(pictures) - 1 else "test") / "good" / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, picture)
    return path


def as_float(path: Path, picture: np.ndarray) -> None:
    values = picture[..., 0].astype(np.float32) / 255
    if int(path.stem) % 2:
        values[0, 0] = 1.001
    Image.fromarray(values).save(path)


def gray(bits: int, path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(path), np.rint(picture[..., 0] * ((2**bits - 1) / 255)).astype(np.uint16))


def colour(bits: int, path: Path, picture: np.ndarray) -> None:
    cv2.imwrite(str(path), np.rint(picture[..., ::-1] * ((2**bits - 1) / 255)).astype(np.uint16))


def with_alpha(path: Path, picture: np.ndarray) -> None:
    values = np.concatenate([picture[..., ::-1], picture[..., :1]], -1).astype(np.uint16) * 257
    cv2.imwrite(str(path), values)


def hot_pixel(path: Path, picture: np.ndarray) -> None:
    values = picture[..., 0].astype(np.uint16) * 16
    values[3, 3] = 65535
    cv2.imwrite(str(path), values)


#: how the same 8-bit picture is stored deeper, the scale of the values, whether colour is stored
DEEP = {
    "12 bits": (functools.partial(gray, 12), ".tif", (0, 4095), False),
    "12 bits in PNG": (functools.partial(gray, 12), ".png", (0, 4095), False),
    "10 bits": (functools.partial(gray, 10), ".tif", (0, 1023), False),
    "16 bits": (functools.partial(gray, 16), ".png", (0, 65535), False),
    "colour in PNG": (functools.partial(colour, 12), ".png", (0, 4095), True),
    "colour in TIFF": (functools.partial(colour, 14), ".tif", (0, 16383), True),
    "colour and alpha": (with_alpha, ".png", (0, 65535), True),
    "float": (as_float, ".tif", (0, 1), False),
    "float to 255": (lambda path, a: Image.fromarray(a[..., 0].astype(np.float32)).save(path), ".tif", (0, 255), False),
    "signed": (lambda path, a: cv2.imwrite(str(path), a[..., 0].astype(np.int16)), ".tif", (0, 255), False),
    "int32": (lambda path, a: Image.fromarray(a[..., 0].astype(np.int32)).save(path), ".tif", (0, 255), False),
    "hot pixel": (hot_pixel, ".tif", (0, 4095), False),
}


@pytest.mark.parametrize("case", DEEP)
def test_a_deeper_file_is_the_same_picture(case, tmp_path):
    """The reference is the 8-bit picture; one level apart at most, by rounding."""
    save, suffix, scale, has_colour = DEEP[case]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), np.uint8)
    pictures[:, 3, 3] = pictures[:, 0, 0] = 255  # where a case stores something else
    path = make(tmp_path, pictures, save, suffix)
    data = module(tmp_path)
    assert data.pixels.value_range == scale
    assert f"data.value_range=[{scale[0]},{scale[1]}] assumed" in data.notes[-1]
    wanted = pictures[-1] if has_colour else np.repeat(pictures[-1][..., :1], 3, -1)
    assert np.abs(data.eval_pipeline.load(path).astype(int) - wanted).max() <= 1


def test_a_range_of_its_own(tmp_path):
    """Thermal images use a small part of 16 bits, elevations are negative: by the formula, clipped in testing."""
    for name, low, high, kind in (("heat", 27000, 31000, np.uint16), ("depth", -20.0, 40.0, np.float32)):
        values = np.linspace(low, high, 4000).reshape(40, 100).astype(kind)
        tested = values.copy()
        tested[0, :2] = (low - 500, high + 500)
        path = make(tmp_path / name, [values, values, tested], lambda path, a: cv2.imwrite(str(path), a))
        data = module(tmp_path / name)
        ends = sorted(values.ravel().tolist())
        assert data.pixels.value_range == (ends[1], ends[-2])  # without the rarest 0.01 %, one pixel here
        wanted = np.clip((tested.astype(float) - ends[1]) / (ends[-2] - ends[1]) * 255, 0, 255)
        loaded = data.eval_pipeline.load(path)[..., 0]
        np.testing.assert_allclose(loaded, wanted, atol=0.501)
        assert loaded[0, :2].tolist() == [0, 255]
        assert data.eval_pipeline.description()["value_range"] == list(data.pixels.value_range)  # features' cache


def test_numbers_that_are_none(tmp_path):
    values = np.random.default_rng(0).random((30, 30), np.float32)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    path = make(tmp_path, [values] * 3, lambda path, a: Image.fromarray(a).save(path))
    assert load_rgb(path, module(tmp_path).pixels.value_range)[0, :3, 0].tolist() == [0, 255, 0]
    assert any("hold NaN or infinite values" in note for note in module(tmp_path).notes)
    for name, value, message in (("nan", np.nan, "no finite number"), ("one", 7, "the value 7 only")):
        make(tmp_path / name, [np.full((9, 9), value, np.float32)] * 3, lambda p, a: Image.fromarray(a).save(p))
        with pytest.raises(UserError, match=rf"data.value_range: the training images hold {message}; give"):
            module(tmp_path / name)


def test_unsigned_32_bits(tmp_path):
    values = (np.arange(2000, dtype=np.uint32) * 2_000_000).reshape(40, 50)
    cv2.imwrite(str(tmp_path / "x.tif"), values)
    wanted = np.rint(values / values.max() * 255)
    assert (load_rgb(tmp_path / "x.tif", (0, float(values.max())))[..., 0] == wanted).all()


def test_files_of_different_depths(tmp_path):
    """Refused in one line, whichever part holds the odd one, unless the range of the deep ones is given."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8)
    plain = make(tmp_path, pictures, lambda path, a: Image.fromarray(a).save(path), ".png")
    deep = plain.with_name("deep.png")
    gray(12, deep, pictures[0])
    train = tmp_path / "part" / "train" / "good" / "000.png"
    with pytest.raises(UserError) as caught:
        module(tmp_path)
    wanted = f"{deep}: its pixels are integers of more than 8 bits, those of {train} 8 bits per channel; convert"
    assert re.match(re.escape(wanted), str(caught.value))
    data = module(tmp_path, value_range=[0, 4095])
    assert (data.eval_pipeline.load(plain) == pictures[-1]).all()
    assert np.abs(data.eval_pipeline.load(deep)[..., 0].astype(int) - pictures[0, ..., 0]).max() <= 1
    deep.unlink()
    assert module(tmp_path).pixels.value_range is None
    assert "data.value_range=[0,4095] changes nothing: all" in module(tmp_path, value_range=[0, 4095]).notes[-1]


# --- masks ---


def disc(value: int = 255, scale: int = 1) -> Image.Image:
    """A disc of radius 50·scale in the middle of a square of 200·scale, by its equation."""
    y, x = np.mgrid[: 200 * scale, : 200 * scale] + 0.5
    inside = (x - 100 * scale) ** 2 + (y - 100 * scale) ** 2 < (50 * scale) ** 2
    return Image.fromarray(inside.astype(np.uint8) * value)


def blurred(radius: float) -> Image.Image:
    return disc().filter(ImageFilter.GaussianBlur(radius))


def few_values(noise: int = 0) -> Image.Image:
    """Edges of at most ten values, as PNGs of smoothed masks have them; or a two-valued mask with some noise."""
    if noise:
        rng, values = np.random.default_rng(0), np.asarray(disc()).astype(int)
        off = rng.integers(0, noise + 1, values.shape)
        return Image.fromarray(np.where(values > 0, 255 - off, off).astype(np.uint8))
    edges = np.asarray(disc(scale=4).resize((200, 200), Image.Resampling.BOX)).astype(float)
    return Image.fromarray((np.rint(edges / 255 * 6) * 42.5).astype(np.uint8))


#: (picture, suffix, options of save): soft ones of the disc
SOFT: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "JPEG": (disc(), ".jpg", {"quality": 75}),
    "colour JPEG": (disc().convert("RGB"), ".jpeg", {"quality": 95}),
    "best JPEG": (disc(), ".jpg", {"quality": 100}),
    "lossy WebP": (disc().convert("RGB"), ".webp", {"quality": 80}),
    "blur": (blurred(1), ".png", {}),
    "wide blur": (blurred(6), ".png", {}),
    "smooth edge": (disc(scale=4).resize((200, 200), Image.Resampling.BOX), ".png", {}),
    "enlarged": (disc().resize((67, 67)).resize((200, 200), Image.Resampling.BILINEAR), ".png", {}),
    "seven values": (few_values(), ".png", {}),
    "noise of 1": (few_values(1), ".png", {}),
    "noise of 3": (few_values(3), ".png", {}),
    "floats": (Image.fromarray(np.asarray(blurred(3)).astype(np.float32) / 255), ".tif", {}),
}


@pytest.mark.parametrize("case", SOFT)
def test_soft_masks_are_cut_at_half(case, tmp_path):
    """Within 4 % of the disc's area; above 0 they would mark up to 70 % more."""
    picture, suffix, options = SOFT[case]
    picture.save(tmp_path / f"mask{suffix}", **options)
    mask, is_soft = read_mask(tmp_path / f"mask{suffix}")
    assert is_soft
    assert abs(mask.sum() / (np.pi * 50**2) - 1) < 0.04
    assert (np.asarray(picture.convert("L") if picture.mode == "RGB" else picture) > 0).sum() >= mask.sum()


def classes(factor: int, width: int = 10) -> np.ndarray:
    """Bars of the class numbers 1..9 times a factor, the ninth one with another class beside it."""
    mask = np.zeros((200, 200), np.uint8)
    for number in range(1, 10):
        mask[number * 20 : number * 20 + width, 20 : 20 + 10 * number] = number * factor
    return mask


HARD = {
    "two values": np.asarray(disc()),
    "classes": classes(1),
    "spread classes": classes(28),
    "three spread classes": classes(1) // 3 * 85,
    "three thin classes": classes(1, width=1) // 3 * 85,
    "thin classes": classes(25, width=1)[:140],
    "classes and 255": np.maximum(classes(1), np.pad(np.full((1, 200), 255, np.uint8), ((0, 199), (0, 0)))),
    "colours": classes(1)[..., None] * np.array([28, 0, 5], np.uint8),
    "instances in 16 bits": classes(1).astype(np.uint16) * 1000,
    "empty": np.zeros((9, 9), np.uint8),
}


@pytest.mark.parametrize("case", HARD)
def test_classes_are_all_defective(case, tmp_path):
    cv2.imwrite(str(tmp_path / "mask.png"), HARD[case])
    mask, is_soft = read_mask(tmp_path / "mask.png")
    wanted = HARD[case].any(-1) if HARD[case].ndim == 3 else HARD[case] > 0
    assert not is_soft
    assert (mask == wanted).all()


def white_palette(mask: Image.Image) -> Image.Image:
    picture = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8)).convert("P")
    picture.putpalette([255, 255, 255, 255, 0, 0] + [0] * 762)
    return picture


def test_masks_that_mark_nearly_everything(tmp_path):
    """Refused where nearly all do; a note names a few; large defects inside an image are none of these."""
    folder = make_mvtec(tmp_path, size=200, defects={"broken": 4})
    masks = sorted((folder / "ground_truth" / "broken").iterdir())
    inverted = Image.fromarray(255 - np.asarray(disc()))
    for picture in (inverted, inverted.convert("RGB"), white_palette(disc()), Image.new("L", (200, 200), 255)):
        for mask in masks:
            picture.save(mask)
        with pytest.raises(UserError) as caught:
            check(read_folder(tmp_path, "all"))
        assert re.match(
            rf"{masks[0]}: this mask marks (80|100)% of its image .* 4 of 4 masks .*invert", str(caught.value)
        )
    disc().save(masks[0])
    disc().filter(ImageFilter.GaussianBlur(2)).save(masks[1])
    assert check(read_folder(tmp_path, "all"))[1] == [
        "bottle: 2 of 4 masks mark more than half of the image as defective (first: broken/002_mask.png, 100%)",
        "bottle: 1 of 4 masks have soft edges, as JPEG and blur leave them, and are cut at half of their largest value "
        "(first: broken/001_mask.png)",
    ]
    for mask in masks:
        disc(scale=2).crop((100, 100, 300, 300)).save(mask)  # 79 %, without the corners
    assert [note[:20] for note in check(read_folder(tmp_path, "all"))[1]] == ["bottle: 4 of 4 masks"]


def test_many_masks_are_not_all_decoded():
    sizes = {Path(f"{i}.png"): (1000, PIXELS // 10_000) for i in range(100)}
    assert evenly_spread(sizes) == [Path(f"{i}.png") for i in range(0, 100, 10)]
    assert evenly_spread(dict(list(sizes.items())[:7])) == list(sizes)[:7]
    assert evenly_spread({Path("x"): (10**5, 10**5)}) == [Path("x")]


# --- orientation ---


def tagged(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def insert_exif(path: Path, number: int, before: bytes) -> None:
    """An eXIf chunk before the PNG's first chunk of this kind."""
    content = path.read_bytes()
    place = content.index(before) - 4
    body = b"eXIf" + tagged(number).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(content[:place] + chunk + content[place:])


@pytest.mark.parametrize("number", range(1, 9))
def test_images_are_upright(number, tmp_path):
    """Pillow's exif_transpose is the reference; deep pictures by their upper 8 bits."""
    picture = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    wanted = np.asarray(ImageOps.exif_transpose(stored := with_tag(picture, number)))
    for suffix, options in ((".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".jpg", {"quality": 100})):
        stored.save(path := tmp_path / f"x{suffix}", exif=tagged(number), **options)
        assert read_header(path).size == wanted.shape[:2]
        exact = suffix != ".jpg"
        reference = wanted if exact else np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert (load_rgb(path) == reference).all(), suffix
    for name, values in (("late", picture[..., ::-1]), ("deep", picture[..., ::-1].astype(np.uint16) * 257)):
        cv2.imwrite(str(path := tmp_path / f"{name}.png"), values)
        insert_exif(path, number, b"IEND" if name == "late" else b"IDAT")
        assert read_header(path).size == wanted.shape[:2]
        assert (load_rgb(path) == wanted).all(), name
    Image.fromarray(picture[..., 0] > 127).save(tmp_path / "m.png", exif=tagged(number))
    assert (load_mask(tmp_path / "m.png") == (wanted[..., 0] > 127)).all()


def with_tag(picture: np.ndarray, number: int) -> Image.Image:
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = number
    return image


def test_tags_that_mean_nothing(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8))
    for number in (0, 9, 300):
        picture.save(tmp_path / "x.png", exif=tagged(number))
        assert (load_rgb(tmp_path / "x.png") == np.asarray(picture)).all()
    picture.save(tmp_path / "y.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (load_rgb(tmp_path / "y.png") == np.asarray(picture)).all()


def test_turned_images_and_their_masks(tmp_path):
    """A mask drawn on the turned view fits; one of the stored size is refused with the reason."""
    folder = make_mvtec(tmp_path, defects={"broken": 1})
    picture = Image.new("RGB", (32, 20))
    picture.save(image := folder / "test" / "broken" / "000.png", exif=tagged(6))
    mask = folder / "ground_truth" / "broken" / "000_mask.png"
    Image.new("L", (20, 32)).save(mask)
    data = read_folder(tmp_path, "all")
    assert check(data)[1] == [f"1 images are turned upright, as their EXIF tag says (first: {image})"]
    Image.new("L", (32, 20)).save(mask, exif=tagged(8))  # a tag of its own
    check(data)
    Image.new("L", (32, 20)).save(mask)
    with pytest.raises(
        UserError, match=r"000_mask.png: the mask is 32x20, its image 000.png 20x32, turned by its EXIF"
    ):
        check(data)


def test_files_of_several_images(tmp_path):
    folder = make_mvtec(tmp_path, defects={})
    pages = [Image.new("L", (32, 32), value) for value in (10, 20)]
    pages[0].save(stack := folder / "train" / "good" / "x.tif", save_all=True, append_images=pages[1:])
    wanted = f"1 files hold more than one image, of which the first is used (first: {stack})"
    assert check(read_folder(tmp_path, "all"))[1] == [wanted]
    assert (load_rgb(stack) == 10).all()


# --- limits ---


def test_large_images_and_long_descriptions(tmp_path):
    """Beyond Pillow's own limits (179 megapixels, 1 MB of text), and without its warnings."""
    header = struct.pack(">IIBBBBB", 20_000, 15_000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
    assert read_header(tmp_path / "large.png").size == (15_000, 20_000)
    text = PngImagePlugin.PngInfo()
    for key in ("settings", "log"):
        text.add_text(key, "x" * 40_000_000, zip=True)
    Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / "text.png", pnginfo=text)
    assert (load_rgb(tmp_path / "text.png") == (1, 2, 3)).all()
    Image.new("L", (9, 9)).save(tmp_path / "tag.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")  # Pillow warns of it
    code = "from pathlib import Path; from anomalib_lite.data.samples import load_rgb; load_rgb(Path('tag.png'))"
    assert (outcome := python("-c", code, cwd=tmp_path)).code == 0, outcome.err
    assert outcome.err == ""


def test_an_image_that_memory_cant_hold(tmp_path):
    message = r"x.png: too large for the memory that is free; give smaller"
    with pytest.raises(UserError, match=message), decoding(tmp_path / "x.png"):
        raise MemoryError
