"""A method on large images: it sees batches of tiles, and its maps are blended to maps of whole images.

Where tiles overlap, a pixel is the mean of the tiles' pixels, weighted by w(i, j) = t_h(i) · t_w(j) with
t_n(i) = min(i + 1, n − i) in a tile of h × w pixels. So a tile fades out towards its borders, in a straight line where
two tiles overlap, and a pixel of a single tile is that tile's pixel.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from anomalib_lite.data.dataset import Batch
from anomalib_lite.data.tiling import Tiling
from anomalib_lite.methods.resizing import resize

PICTURES = ("image", "mask", "clean", "corruption_mask")  # what is cut; all else of a batch belongs to whole images
Places = list[tuple[int, int, int]]  # (position in the batch, top, left) of tiles


def tiles_of(batch: dict[str, Any], tiling: Tiling) -> Iterator[tuple[Batch, Places]]:
    """The tiles of a batch of images [B, 3, H, W], image by image, in batches of `tiling.batch`, and their places.

    A tile has its image's `index`, `category`, `label`, `path` and `size`.
    """
    height, width = batch["image"].shape[-2:]
    places = [(i, *place) for i in range(len(batch["image"])) for place in tiling.places(height, width)]
    for first in range(0, len(places), tiling.batch):
        chosen = places[first : first + tiling.batch]
        yield _cut(batch, chosen, tiling.size), chosen


def _cut(batch: dict[str, Any], places: Places, size: tuple[int, int]) -> Batch:
    count, tiles = len(batch["image"]), Batch(batch)
    for key, value in batch.items():
        if key in PICTURES:
            tiles[key] = torch.stack([value[i, ..., y : y + size[0], x : x + size[1]] for i, y, x in places])
        elif isinstance(value, Tensor) and value.ndim:
            tiles[key] = value[[i for i, _, _ in places]]
        elif isinstance(value, list) and len(value) == count:
            tiles[key] = [value[i] for i, _, _ in places]
    return tiles


def tiled(compute: Callable[[Batch], dict[str, Tensor]], batch: dict[str, Any], tiling: Tiling) -> dict[str, Tensor]:
    """{name: [B, C, H, W]} for images [B, 3, H, W], blended from what `compute` gives for batches of tiles.

    Args:
        compute: n tiles -> {name: [n, C, h, w]}, which are resized to the tiles' size.
    """
    return_freed_memory()  # of what came before, then of the tiles
    (count, _, height, width), whole = batch["image"].shape, dict[str, Tensor]()
    weights = [fades(starts, side) for starts, side in zip(tiling.axes(height, width), tiling.size, strict=True)]
    device = batch["image"].device
    tops, lefts = ({start: weight.to(device) for start, weight in each.items()} for each in weights)
    for tiles, places in tiles_of(batch, tiling):
        for name, values in compute(tiles).items():
            values = values.float()
            if values.shape[-2:] != tiling.size:
                values = resize(values, tiling.size)
            if name not in whole:
                whole[name] = values.new_zeros(count, values.shape[1], height, width)
            for value, (i, y, x) in zip(values, places, strict=True):
                place = whole[name][i, :, y : y + tiling.size[0], x : x + tiling.size[1]]
                place += value * (tops[y][:, None] * lefts[x])
    return_freed_memory()
    return whole


def return_freed_memory() -> None:
    """Give the system the memory that this process has freed. The C library keeps what small allocations leave behind:
    after a batch of tiles hundreds of megabytes, which whole images could use. Does nothing where it can't be done.
    """
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def fades(starts: list[int], side: int) -> dict[int, Tensor]:
    """Weights float32 [side] along one axis for the tile at each of the starts; at every pixel they add up to 1."""
    fade = torch.minimum(torch.arange(1, side + 1), torch.arange(side, 0, -1)).double()
    total = torch.zeros(max(starts) + side, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += fade
    return {start: (fade / total[start : start + side]).float() for start in starts}


def tiled_map(
    anomaly_map: Callable[[Batch], Tensor | tuple[Tensor, Tensor]], batch: dict[str, Any], tiling: Tiling
) -> Tensor | tuple[Tensor, Tensor]:
    """The anomaly maps [B, H, W] of whole images, blended from the tiles' maps.

    If the method has image scores of its own, an image's score [B] is the largest of its tiles.
    """
    scores = list[Tensor]()

    def maps(tiles: Batch) -> dict[str, Tensor]:
        raw = anomaly_map(tiles)
        if isinstance(raw, tuple):
            raw, own = raw
            scores.append(own)
        return {"map": raw[:, None]}

    whole = tiled(maps, batch, tiling)["map"][:, 0]
    return (whole, torch.cat(scores).view(len(whole), -1).amax(1)) if scores else whole


def position_note(tiling: Tiling | None) -> list[str]:
    """The note of a method that compares equal positions."""
    return ["data.tiling: this method compares equal positions of tiles, not of images"] if tiling else []
