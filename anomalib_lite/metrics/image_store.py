"""Many images [H_i, W_i] that are stored once: in memory up to a limit, and what comes later in a temporary file."""

import copy
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anomalib_lite.errors import UserError
from anomalib_lite.methods.tiles import return_freed_memory

Array = NDArray[Any]
MEMORY = 2**30  # bytes
_TRIMMED = 2**28  # bytes that are added between two calls of `return_freed_memory`


class _Batch(NamedTuple):
    """Images of one size: [B, H·W] in memory, or at an offset of the file; booleans as bits, [B, H·W / 8]."""

    shape: tuple[int, ...]  # [B, H, W]
    rows: Array | None  # None: all are False
    offset: int = -1  # in bytes, where the rows are in the file; `rows` is then an empty array of their type and width


class ImageStore(Sequence[Array]):
    """A sequence of images of one type, read-only. An image that lies in the file is read whenever it is asked for.

    The file has no name from its creation on, so nothing is left behind, however the process ends.

    Args:
        dtype: of the images. Booleans take a bit per pixel, and nothing where a whole batch is False.
        folder: where the file is created; None: the system's folder for temporary files.
        limit: bytes that stay in memory.
    """

    def __init__(self, dtype: Any, folder: Path | None = None, limit: int = MEMORY):
        self.dtype, self.folder, self.limit = np.dtype(dtype), folder, limit
        self.used, self.file = 0, None
        self.batches: list[_Batch] = []
        self.places: list[tuple[int, int]] = []  # of each image its batch and its row there

    def add(self, images: Array) -> None:
        """Append images [B, H, W] of the store's type, which must not be changed afterwards.

        Raises:
            UserError: the disk is full.
        """
        rows: Array | None = np.ascontiguousarray(images).reshape(len(images), -1)
        if self.dtype == bool:
            rows = np.packbits(rows, axis=1) if images.any() else None  # type: ignore[arg-type]
        offset = -1
        if rows is not None:
            self.used += rows.nbytes
            if self.used % _TRIMMED < rows.nbytes:
                return_freed_memory()  # the next batch often fits into no gap that one before has left
            if self.used > self.limit:
                offset, rows = self._write(rows), np.empty((0, rows.shape[1]), rows.dtype)
        self.places += [(len(self.batches), row) for row in range(len(images))]
        self.batches.append(_Batch(images.shape, rows, offset))

    def batch(self, number: int) -> Array:
        """The images of the `number`-th call of `add`, [B, H, W]."""
        return np.stack([self._image(number, row) for row in range(self.batches[number].shape[0])])

    def ordered(self, places: Sequence[int]) -> "ImageStore":
        """The images at these places, in this order; they are not copied."""
        store = self.extended()
        store.places = [self.places[place] for place in places]
        return store

    def extended(self) -> "ImageStore":
        """A store of the same images, which are not copied, that can be added to without changing this one."""
        store = copy.copy(self)
        store.batches, store.places = list(self.batches), list(self.places)
        return store

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        return self._image(*self.places[i])

    def _image(self, number: int, row: int) -> Array:
        (_, *shape), rows, offset = self.batches[number]
        if rows is None:
            return np.zeros(shape, bool)
        if offset < 0:
            values = rows[row]
        else:
            values = np.empty(rows.shape[1], rows.dtype)
            os.preadv(self.file.fileno(), [values.data], offset + row * values.nbytes)  # type: ignore[attr-defined]
        if self.dtype == bool:
            values = np.unpackbits(values, count=math.prod(shape)).view(bool)
        return values.reshape(shape)

    def _write(self, rows: Array) -> int:
        """Append rows to the file and give their offset."""
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.folder)  # type: ignore[assignment] # noqa: SIM115
            offset = self.file.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
            self.file.write(rows.data)  # type: ignore[attr-defined]
            self.file.flush()  # type: ignore[attr-defined]
        except OSError as error:
            raise UserError(
                f"{self.folder or tempfile.gettempdir()}: no room for the anomaly maps that do not fit into "
                f"{self.limit / 2**30:.1f} GB of memory ({error.strerror}); free space there, or give a smaller "
                "scoring.map_size"
            ) from error
        return offset
