"""Small trees in the benchmarks' layouts, as their papers and archives describe them: each gives its root."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.image_trees import make_mvtec, save_image, save_mask

#: LOCO's defects: value in the mask -> (threshold, relative)
DEFECTS = {255: (40, False), 254: (0.25, True), 253: (100, False)}


def save_square(path: Path, corner: int, side: int, value: int, size: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size, size), np.uint8)
    mask[corner : corner + side, corner : corner + side] = value
    Image.fromarray(mask).save(path)
    return path


def make_ad2(root: Path, categories: tuple[str, ...] = ("can", "rice")) -> Path:
    """CATEGORY/{train/good, validation/good, test_public/{good,bad,ground_truth/bad}, test_private, ...}."""
    for category in categories:
        folder = make_mvtec(root, category, train=4, good=2, defects={"bad": 2})
        (folder / "test").rename(folder / "test_public")
        (folder / "ground_truth").rename(folder / "test_public" / "ground_truth")
        for part in ("validation/good", "test_private", "test_private_mixed"):
            save_image(folder / part / "000_regular.png", seed=len(part))
    return root


def make_loco(root: Path, categories: tuple[str, ...] = ("pushpins", "screw_bag")) -> Path:
    """The MVTec layout with a folder of masks per image: the first logical one has two, which overlap by 4 pixels."""
    for category in categories:
        kinds = {"logical_anomalies": 2, "structural_anomalies": 1}
        folder = make_mvtec(root, category, train=4, good=2, defects=kinds, masks=False)
        save_image(folder / "validation" / "good" / "000.png")
        truth = folder / "ground_truth"
        save_square(truth / "logical_anomalies" / "000" / "000.png", 4, 8, 255)
        save_square(truth / "logical_anomalies" / "000" / "001.png", 10, 10, 254)
        save_square(truth / "logical_anomalies" / "001" / "000.png", 20, 6, 253)
        save_square(truth / "structural_anomalies" / "000" / "000.png", 2, 9, 254)
        entries = [
            {
                "defect_name": f"d{p}",
                "pixel_value": p,
                "saturation_threshold": threshold,
                "relative_saturation": relative,
            }
            for p, (threshold, relative) in DEFECTS.items()
        ]
        (folder / "defects_config.json").write_text(json.dumps(entries))
    return root


def make_btad(root: Path, categories: tuple[str, ...] = ("01", "03")) -> Path:
    """CATEGORY/{train/ok, test/{ok,ko}, ground_truth/ko}, images as BMP and masks as PNG."""
    for category in categories:
        for part, count in (("train/ok", 4), ("test/ok", 2), ("test/ko", 2)):
            for i in range(count):
                save_image(root / category / part / f"{i:04}.bmp", seed=sum(map(ord, category + part)) + i)
        for i in range(2):
            save_mask(root / category / "ground_truth" / "ko" / f"{i:04}.png")
    return root


def make_mpdd(root: Path, categories: tuple[str, ...] = ("connector", "tubes")) -> Path:
    for category in categories:
        make_mvtec(root, category, train=4, good=2, defects={"parts_mismatch": 2})
    return root


def make_real_iad(root: Path, categories: tuple[str, ...] = ("audiojack", "zipper"), nested: bool = True) -> Path:
    """realiad_1024/CATEGORY/{OK,NG}/..., and lists of two protocols: views C1 and C2, and C1 alone.

    Every defective object is defective in its view C1 only.
    """
    lists = root / "realiad_jsons" if nested else root
    for category in categories:
        content: dict = {"meta": {"normal_class": "OK", "prefix": f"{category}/"}, "train": [], "test": []}
        for part, kind, number in (
            *(("train", "OK", i) for i in range(2)), ("test", "OK", 2), *(("test", "AK", i) for i in range(2)),
        ):  # fmt: skip
            for view in ("C1", "C2"):
                below = (
                    f"{'OK' if kind == 'OK' else f'NG/{kind}'}/S{number:04}/{category}_{number:04}_{kind}_{view}_2023"
                )
                save_image(root / "realiad_1024" / category / f"{below}.jpg", seed=sum(map(ord, category + below)))
                label = kind if view == "C1" else "OK"
                entry = {"category": category, "anomaly_class": label, "image_path": f"{below}.jpg", "mask_path": None}
                if label != "OK":
                    entry["mask_path"] = f"{below}.png"
                    save_mask(root / "realiad_1024" / category / f"{below}.png")
                content[part].append(entry)
        for name in ("realiad_jsons", "realiad_jsons_sv"):
            (lists / name).mkdir(parents=True, exist_ok=True)
            shown = [
                [e for e in content[part] if "sv" not in name or "_C1_" in e["image_path"]]
                for part in ("train", "test")
            ]
            file = lists / name / f"{category}.json"
            file.write_text(json.dumps(content | {"train": shown[0], "test": shown[1]}))
    return root


def make_sdd(root: Path, items: int = 5) -> Path:
    """kos01/Part0.jpg and Part0_label.bmp: two normal images and, in the first two items, a defective one."""
    for item in range(1, items + 1):
        for part in range(3 if item < 3 else 2):
            image = save_image(root / f"kos{item:02}" / f"Part{part}.jpg", seed=10 * item + part)
            save_mask(image.with_name(f"Part{part}_label.bmp"), value=255 if part == 2 else 0)
    return root


def make_sdd2(root: Path) -> Path:
    """{train,test}/10000.png and 10000_GT.png, with the copies that the archive contains by mistake."""
    for part, count, first in (("train", 5, 10000), ("test", 4, 20000)):
        for i in range(count):
            image = save_image(root / part / f"{first + i}.png", seed=first + i)
            save_mask(image.with_name(f"{first + i}_GT.png"), value=255 if i == 0 else 0)
    for stem in ("10001", "10001_GT"):
        file = root / "train" / f"{stem}.png"
        (root / "train" / f"{stem} (copy).png").write_bytes(file.read_bytes())
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "mvtec_ad_2": make_ad2, "mvtec_loco": make_loco, "real_iad": make_real_iad, "btad": make_btad, "mpdd": make_mpdd,
    "kolektor_sdd": make_sdd, "kolektor_sdd2": make_sdd2,
}  # fmt: skip
