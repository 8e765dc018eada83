"""Training images that are held out for validation, and what identifies a data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anomalib_lite.data.dataset import HOLD_OUT
from anomalib_lite.data.masks import mask_files
from anomalib_lite.data.samples import DataSet, Sample

CORRUPTED = "corrupted"  # what results call an artificial defect; a defect of the data set may have the same name


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples without a share of each category's normal images, those images, and notes.

    Every second held-out image gets an artificial defect. At least one image of a category remains for training.
    """
    if share == 0:
        return samples, [], []
    held, notes = list[Sample](), list[str]()
    for category in dict.fromkeys(sample.category for sample in samples):
        normal = [s for s in samples if s.category == category and not s.label]  # a split may admit defective ones
        count = min(max(1, round(share * len(normal))), len(normal) - 1)
        if count < 2:  # image metrics need a normal and a corrupted image
            notes.append(f"{category}: {len(normal)} training images are too few to validate on a share of them")
        # The category's name, not its position, seeds the draw: it does not depend on the other categories.
        rng = np.random.default_rng([seed, HOLD_OUT, *category.encode()])
        drawn = sorted(rng.permutation(len(normal))[: max(count, 0)])
        held += [
            replace(normal[i], defect=CORRUPTED, label=1, artificial=True) if n % 2 else normal[i]
            for n, i in enumerate(drawn)
        ]
    paths = {sample.path for sample in held}
    notes.append(f"data.val_fraction={share}: {len(held)} training images held out for validation")
    return [sample for sample in samples if sample.path not in paths], held, notes


def fingerprint(data: DataSet) -> str:
    """SHA-256 over the sorted files' paths below the root, sizes, labels and masks: the same wherever the root lies."""

    def entry(files: Sequence[Path]) -> str:
        return "\t".join(f"{file.relative_to(data.root).as_posix()}\t{file.stat().st_size}" for file in files)

    lines = [
        f"{part}\t{s.label}\t{entry([s.path])}\t{entry(mask_files(s.mask) if s.mask else ())}"
        for part, samples in (("train", data.train), ("test", data.test))
        for s in samples
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
