"""data.check=only: what the data set holds, as lines and as one picture. Nothing is trained."""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from anomalib_lite.console import make_console
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.image_files import read_header
from anomalib_lite.data.samples import Sample, load_mask
from anomalib_lite.paths import make_folder
from anomalib_lite.runs import build
from anomalib_lite.runs.folder import DATA_PICTURE
from anomalib_lite.runs.heat_maps import outlined

TILE, GAP, COLUMNS = 160, 4, 6  # pixels: the side of an image and the space between two; images of each kind


def report(config: dict[str, Any], run: Path) -> None:
    """Check every file, print what was found, and write a picture of samples into the folder `run`."""
    data = build.make_data(config | {"data": config["data"] | {"check": "thorough"}})
    console = make_console()
    for line in [f"{data.name} in {data.root}", *lines(data)]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for note in data.notes:
        console.print(f"note: {note}", style="dim", soft_wrap=True, markup=False)
    make_folder(run, "hydra.run.dir")
    Image.fromarray(picture(data)).save(run / DATA_PICTURE)
    console.print(f"nothing was trained (data.check=only); sample images: {run / DATA_PICTURE}", soft_wrap=True)


def lines(data: AnomalyDataModule) -> list[str]:
    """Numbers of images and masks, sizes and depths of each category."""
    found = []
    for category in data.categories:
        train = [sample for sample in [*data.train_samples, *data.val_samples] if sample.category == category]
        test = [sample for sample in data.test_samples if sample.category == category]
        found.append(f"{category}: {len(train)} training images, {len(test)} test images")
        for defect in dict.fromkeys(sample.defect for sample in test):
            kind = [sample for sample in test if sample.defect == defect]
            masks = f", {sum(sample.mask is not None for sample in kind)} masks" if kind[0].label else ""
            found.append(f"  test {defect}: {len(kind)} images{masks}")
        headers: Counter[str] = Counter()
        for sample in [*train, *test]:
            header = read_header(sample.path)
            headers[f"{header.size[1]}x{header.size[0]} {header.depth} {sample.path.suffix.lower()}"] += 1
        shown = ", ".join(f"{kind} ({count})" for kind, count in headers.most_common(6))
        found.append(f"  width x height, depth, format: {shown}{', ...' * (len(headers) > 6)}")
        if data.tiling:
            found += tile_lines(data, sorted({read_header(sample.path).size for sample in [*train, *test]}))
    return found


def tile_lines(data: AnomalyDataModule, sizes: list[tuple[int, int]], most: int = 6) -> list[str]:
    """The grid of tiles in images of these files' (height, width); of the first `most` sizes."""
    assert data.tiling
    (height, width), found = data.tiling.size, []
    for size in sizes[:most]:
        at = size if isinstance(data.tiling.image_size, str) else data.tiling.image_size
        rows, columns = (len(starts) for starts in data.tiling.axes(*at))
        resized = f" at {at[1]}x{at[0]}" if at != size else ""
        found.append(
            f"  tiles of {width}x{height} in an image of {size[1]}x{size[0]}{resized}: {rows * columns}, in {rows} "
            f"rows and {columns} columns that overlap by {data.tiling.overlap} or more"
        )
    return found


def picture(data: AnomalyDataModule) -> np.ndarray:
    """Samples as the run sees them, uint8 [H, W, 3]: for each category a row of training images, of good test images,
    and of defective ones with their masks outlined.
    """
    rows = []
    for category in data.categories:
        good = [sample for sample in data.test_samples if sample.category == category and not sample.label]
        defective = [sample for sample in data.test_samples if sample.category == category and sample.label]
        train = [sample for sample in data.train_samples if sample.category == category]
        rows += [row for row in (train, good, defective) if row]
    height, width = (count * (TILE + GAP) + GAP for count in (len(rows), COLUMNS))
    sheet = np.full((height, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j in range(min(COLUMNS, len(row))):
            y, x = (GAP + position * (TILE + GAP) for position in (i, j))
            sheet[y : y + TILE, x : x + TILE] = _tile(data, row[j * len(row) // min(COLUMNS, len(row))])
    return sheet


def _tile(data: AnomalyDataModule, sample: Sample) -> np.ndarray:
    image = data.eval_pipeline.load(sample.path)
    tile = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
    with contextlib.suppress(cv2.error):
        if sample.mask is not None:
            return outlined(tile, load_mask(sample.mask, sample.dark_mask))
    return tile
