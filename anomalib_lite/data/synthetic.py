"""A data set of drawn images in the MVTec layout, generated on first use, for tests and first steps without a download.

It has two textures (`fabric`, single-channel like MVTec's grid, and `wood`) and two objects (`gear`, `board`).
"""

import functools
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from anomalib_lite.data.cores import threads
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.samples import DataSet
from anomalib_lite.data.synthetic_drawings import CATEGORIES, picture
from anomalib_lite.errors import UserError
from anomalib_lite.paths import cache_folder, whole_folder

VERSION = 1  # raise this number whenever a pixel changes: it is part of the cache folder's name
STAMP = "synthetic.json"
log = logging.getLogger(__name__)


def _holds(root: Path, stamp: dict) -> bool:
    """Whether `root` holds the set with these parameters. Raises UserError if it holds anything else."""
    if (root / STAMP).is_file() and json.loads((root / STAMP).read_text()) == stamp:
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds something other than this synthetic set; give an empty folder in data.root")
    return False


def generate(
    root: str | Path, seed=0, size=256, train=40, good=16, defective=8, categories: Sequence[str] | None = None
) -> Path:
    """Draw the set into the folder `root` unless it exists; `defective` is the number of images per kind of defect.

    The folder appears complete or not at all: the images are written to a temporary folder, which is then renamed. If
    another process finished the same set first, its set stays. Raises UserError for unusable parameters or folders.
    """
    root, names = Path(root).expanduser().absolute(), list(categories or CATEGORIES)
    if unknown := [name for name in names if name not in CATEGORIES]:
        raise UserError(f"data.category: no synthetic category {unknown[0]!r}; choose from {', '.join(CATEGORIES)}")
    if seed < 0 or size < 64 or min(train, good, defective) < 1:
        raise UserError("data: give the synthetic set seed >= 0, size >= 64 and at least one image of each kind")
    counts = {"train": train, "good": good, "defective": defective}
    stamp = {"version": VERSION, "seed": seed, "size": size, **counts, "categories": names}
    if _holds(root, stamp):
        return root
    log.info("drawing the synthetic data set into %s", root)
    jobs: list[tuple[str, str, str | None, int, int]] = []
    for name in names:
        jobs += [(name, "train/good", None, 0, i) for i in range(train)]
        jobs += [(name, "test/good", None, 1, i) for i in range(good)]
        for split, kind in enumerate(CATEGORIES[name][1], start=2):
            jobs += [(name, f"test/{kind}", kind, split, i) for i in range(defective)]

    def write(path: Path, image: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())

    def make(draft: Path, job: tuple[str, str, str | None, int, int]) -> None:
        name, folder, kind, split, index = job
        image, mask = picture(name, kind, seed, size, split, index)
        write(draft / name / folder / f"{index:03d}.png", image)
        if kind:
            write(draft / name / f"ground_truth/{kind}/{index:03d}_mask.png", mask[..., None].astype(np.uint8) * 255)

    try:
        # threads suffice: NumPy and OpenCV release the GIL
        with whole_folder(root) as draft, ThreadPoolExecutor(threads()) as pool:
            list(pool.map(functools.partial(make, draft), jobs))
            (draft / STAMP).write_text(json.dumps(stamp))
    except OSError as error:
        if not _holds(root, stamp):
            hint = "choose another data.root or, for the cache, ANOMALIB_LITE_CACHE"
            raise UserError(f"{root}: can't write the synthetic data set ({error.strerror}); {hint}") from None
    return root


def cached_root(seed=0, size=256, train=40, good=16, defective=8) -> Path:
    """The folder in the cache for the set with these parameters; it may not exist yet."""
    return cache_folder() / "synthetic" / f"v{VERSION}-seed{seed}-size{size}-{train}-{good}-{defective}"


def read_synthetic(
    root: str | Path | None, category: str | Sequence[str], seed=0, size=256, train=40, good=16, defective=8
) -> DataSet:
    """Read the set with these parameters; it is drawn first if it does not exist. `root` None: a cache folder."""
    if root is None:
        root = cached_root(seed, size, train, good, defective)
    return read_folder(generate(root, seed, size, train, good, defective), category)
