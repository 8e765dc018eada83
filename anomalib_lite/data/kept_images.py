"""Resized images as uint8, decoded once: the processes that load data share them in memory or in a mapped file."""

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.data.transforms import Resize
from anomalib_lite.paths import cache_folder

log = logging.getLogger(__name__)

Kept = tuple[np.ndarray, tuple[int, int]]  # the resized image, uint8 [h, w, 3], and the file's own (H, W)


class KeptImages:
    """Images that any process forked after the construction has decoded and resized by `resize`; without it none.

    Up to `memory_gb` GB they lie in shared memory, of which only images in use take a part. Otherwise they lie in a
    file below `cache_folder()`, which has no name and is gone with the run. With 0, or without room, none is kept.
    """

    def __init__(self, paths: Sequence[Path], resize: Resize | None, memory_gb: float):
        self.rows = {path: row for row, path in enumerate(paths)} if memory_gb and resize else {}
        shape = (len(self.rows), *(resize.size if resize else (1, 1)), 3)
        try:
            pixels = shared_bytes(math.prod(shape), math.prod(shape) > memory_gb * 2**30)
        except OSError as error:
            log.info("images are decoded in every epoch: more than data.image_memory_gb, and no file (%s)", error)
            self.rows, shape, pixels = {}, (0, 1, 1, 3), shared_bytes(0, False)
        self.images = np.frombuffer(pixels, np.uint8, math.prod(shape)).reshape(shape)
        #: (H, W) of each file, written after its image; 0 for an image that is not there yet
        self.sizes = np.frombuffer(shared_bytes(8 * len(self.rows), False), np.int32, 2 * len(self.rows)).reshape(-1, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Processes that are not forked share nothing."""
        return {"rows": {}}

    def get(self, path: Path) -> Kept | None:
        """A copy of the image, if some process has put it."""
        row = self.rows.get(path)
        if row is None or not self.sizes[row].all():
            return None
        return self.images[row].copy(), (int(self.sizes[row, 0]), int(self.sizes[row, 1]))

    def put(self, path: Path, image: np.ndarray, size: tuple[int, int]) -> Kept:
        if (row := self.rows.get(path)) is not None:
            self.images[row] = image
            self.sizes[row] = size
        return image, size


def shared_bytes(size: int, on_disk: bool) -> mmap.mmap:
    """Zeros that this process and those that it forks share. Raises OSError if the disk has no room."""
    if not on_disk:
        return mmap.mmap(-1, max(size, 1))
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_folder()) as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)  # now, because a write into the map could only crash
        else:
            os.ftruncate(file.fileno(), size)
        return mmap.mmap(file.fileno(), size)
