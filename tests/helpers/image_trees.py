"""Small data sets on disk, of random pictures, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_image(path: Path, size: int = 32, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return path


def save_mask(path: Path, size: int = 32, value: int = 255) -> Path:
    """A square of `value` in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : size // 2, size // 4 : size // 2] = value
    Image.fromarray(mask).save(path)
    return path


def make_mvtec(
    root: Path,
    category: str = "bottle",
    train: int = 6,
    good: int = 3,
    defects: dict[str, int] | None = None,
    size: int = 32,
    suffix: str = "_mask",
    masks: bool = True,
) -> Path:
    """A category in the MVTec layout; every picture differs. Returns its folder."""
    folder = root / category
    defects = {"broken": 3} if defects is None else defects
    seed = sum(category.encode()) * 1000
    for part, count in (("train/good", train), ("test/good", good), *((f"test/{d}", n) for d, n in defects.items())):
        for i in range(count):
            seed += 1
            save_image(folder / part / f"{i:03}.png", size, seed)
    for defect, count in defects.items() if masks else ():
        for i in range(count):
            save_mask(folder / "ground_truth" / defect / f"{i:03}{suffix}.png", size)
    return folder


def make_visa(
    root: Path,
    category: str = "candle",
    train: int = 4,
    good: int = 2,
    bad: int = 2,
    size: int = 32,
    others: bool = True,
) -> Path:
    """An object in VisA's raw layout and its rows in split_csv/1cls.csv (CRLF); returns the table's path.

    `others` adds a row of an object that is not on disk, as the official table has with a part of VisA.
    """
    table = root / "split_csv" / "1cls.csv"
    lines = table.read_text().split() if table.exists() else ["object,split,label,image,mask"]
    base = f"{category}/Data"
    for i in range(train + good):
        name = f"{base}/Images/Normal/{i:04}.JPG"
        save_image(root / name, size, i)
        lines.append(f"{category},{'train' if i < train else 'test'},normal,{name},")
    for i in range(bad):
        name, mask = f"{base}/Images/Anomaly/{i:03}.JPG", f"{base}/Masks/Anomaly/{i:03}.png"
        save_image(root / name, size, 1000 + i)
        save_mask(root / mask, size, value=1 + i)  # VisA's masks hold class numbers
        lines.append(f"{category},test,anomaly,{name},{mask}")
    if others:
        lines.append("pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,")
    table.parent.mkdir(exist_ok=True)
    table.write_bytes("\r\n".join([*lines, ""]).encode())
    return table
