"""A frozen backbone's features of a run's images: rows in memory, mapped from files, or as one table on a GPU."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anomalib_lite.data.dataset import AnomalyDataset
from anomalib_lite.data.pipeline import Pipeline

BLOCK = 256  # rows that are copied to a GPU at once


class StoredFeatures:
    """Features of images that `pipeline` has prepared.

    A row [Σ H_i·W_i·C_i] holds the levels of one image one after the other, channels last. Rows lie in tables.

    Args:
        shapes: (H_i, W_i, C_i) of every level.
    """

    def __init__(self, pipeline: Pipeline, shapes: Iterable[tuple[int, ...]] = ()):
        self.pipeline, self.shapes = pipeline, list(shapes)
        self.tables, self.places = list[Tensor](), dict[str, tuple[int, int]]()  # by path: (number of the table, row)
        self.on_device: tuple[list[str], Tensor] | None = None  # paths, and their rows [N, Σ] on a GPU

    def add(self, table: Tensor, rows: Mapping[str, int]) -> None:
        """Add a table [N, Σ]; `rows` gives the row of each path."""
        self.places.update((path, (len(self.tables), row)) for path, row in rows.items())
        self.tables.append(table)

    def row(self, path: str) -> Tensor:
        table, row = self.places[path]
        return self.tables[table][row]

    def holds(self, paths: Sequence[str]) -> bool:
        """Whether all of these images have a row; False for no images."""
        return bool(paths) and all(path in self.places for path in paths)

    def rows_of(self, dataset: AnomalyDataset) -> "Rows | None":
        """The rows of a dataset's images in its order; None if one is missing or the dataset changes its images.

        Crops, augmentations and corruptions change an image, so its stored features would be another image's.
        """
        paths = [str(sample.path) for sample in dataset.samples]
        if dataset.pipeline is not self.pipeline or dataset.corrupts or not self.holds(paths):
            return None
        on_device = self.on_device[1] if self.on_device and self.on_device[0] == paths else None
        return Rows(self.tables, [self.places[path] for path in paths], self.shapes, on_device)

    def to_device(self, paths: list[str], device: torch.device, limit: float) -> bool:
        """Copy the rows of these images into one table on a GPU; return False if it exceeds `limit` bytes.

        Datasets of these images in this order then take their rows from it.
        """
        if not self.holds(paths) or len(paths) * self.row(paths[0]).nbytes > limit:
            return False
        rows = Rows(self.tables, [self.places[path] for path in paths], self.shapes)
        table = torch.empty(len(paths), self.row(paths[0]).numel(), dtype=self.row(paths[0]).dtype, device=device)
        for first in range(0, len(paths), BLOCK):
            part = table[first : first + BLOCK]
            part.copy_(rows.gathered(torch.arange(first, first + len(part))))
        self.on_device = paths, table
        return True


class Rows:
    """Rows of a dataset's images in its order: row i is row `places[i][1]` of table `places[i][0]`.

    `on_device` holds all of them as one table on a GPU, or is None.
    """

    def __init__(
        self,
        tables: Sequence[Tensor],
        places: Sequence[tuple[int, int]],
        shapes: Sequence[tuple[int, ...]],
        on_device: Tensor | None = None,
    ):
        self.tables, self.shapes, self.on_device = tables, shapes, on_device
        self.numbers, self.rows = torch.tensor(places).T.contiguous()  # of tables, and of rows in them
        self.first = tables[places[0][0]]
        self.all_in_first = len({table for table, _ in places}) == 1

    def gathered(self, indices: Tensor, pinned: bool = False) -> Tensor:
        """A copy of these images' rows [B, Σ] in host memory, pinned if a GPU is to read it without waiting."""
        # `out` keeps the type: under autocast, torch.stack may give another one
        out = torch.empty(len(indices), self.first.shape[1], dtype=self.first.dtype, pin_memory=pinned)
        if self.all_in_first:
            return torch.index_select(self.first, 0, self.rows[indices], out=out)
        for place, table, row in zip(out, self.numbers[indices].tolist(), self.rows[indices].tolist(), strict=True):
            place.copy_(self.tables[table][row])
        return out

    def levels(self, rows: Tensor) -> list[Tensor]:
        """Rows [B, Σ] as levels [B, H_i, W_i, C_i]."""
        parts = rows.split([height * width * channels for height, width, channels in self.shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
