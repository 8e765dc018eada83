"""The grid of overlapping tiles into which large images are cut: the same in training, test and prediction."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from anomalib_lite.data.transforms import pair
from anomalib_lite.errors import UserError


class Tiling:
    """Tiles whose neighbours overlap by `overlap` pixels; the last tile of a row or column is shifted to the border.

    Args:
        size: a side, or [height, width]. overlap: from 0, below the tile's shorter side.
        image_size: size to which images are resized before they are cut; "original": they are not resized.
        batch: number of tiles that pass through the network together.

    Raises UserError if tiles don't fit.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        overlap: int = 0,
        image_size: int | Sequence[int] | str = "original",
        batch: int = 1,
    ):
        self.size, self.overlap, self.batch = pair(size), overlap, batch
        self.image_size = image_size if isinstance(image_size, str) else pair(image_size)
        if not isinstance(self.image_size, str):
            try:
                self.axes(*self.image_size)
            except UserError as error:
                raise UserError(f"data.tiling.image_size: {error}") from None

    def axes(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """The tiles' tops and lefts in an image of this size. Raises UserError if it is smaller than a tile."""
        if height < self.size[0] or width < self.size[1]:
            raise UserError(
                f"{height}×{width} pixels are smaller than a tile of {self.size[0]}×{self.size[1]} (data.tiling.size); "
                "give smaller tiles, or a larger data.tiling.image_size to resize images to"
            )
        tops, lefts = (
            [*range(0, length - side, side - self.overlap), length - side]
            for length, side in zip((height, width), self.size, strict=True)
        )
        return tops, lefts

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of every tile, row by row; errors as of `axes`."""
        return list(product(*self.axes(height, width)))

    def counts(self, sizes: Mapping[Path, tuple[int, int]]) -> dict[Path, int]:
        """The number of tiles of each image, from the files' (height, width).

        Raises UserError with the first file that is smaller than a tile.
        """
        found = {}
        for path, size in sizes.items():
            try:
                found[path] = len(self.places(*(size if isinstance(self.image_size, str) else self.image_size)))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        return found

    def note(self, counts: Mapping[Path, int]) -> str:
        """What a result says of the tiles."""
        least, most = min(counts.values()), max(counts.values())
        number = f"{most} tiles" if least == most else f"{least} to {most} tiles"
        return (
            f"data.tiling: images are cut into {number} of {self.size[0]}×{self.size[1]}, which the model sees instead "
            "of data.image_size; maps, scores and the cost are those of whole images"
        )
