"""Our albumentations transforms of an image and its mask: `_target_`s of data.transform and data.augment."""

from collections.abc import Callable, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from anomalib_lite.errors import UserError


class Resize(A.DualTransform):
    """Resize to `size` (a side, or [height, width]) with PIL's antialiased filter; masks with PIL's nearest.

    albumentations' own Resize does not antialias, which changes 1024² originals visibly. `resample` is one of PIL's
    names: nearest, box, bilinear, hamming, bicubic, lanczos. Image uint8 [H, W] or [H, W, C].
    """

    def __init__(self, size: int | Sequence[int], resample: str = "bilinear", p: float = 1.0):
        super().__init__(p=p)
        self.size = pair(size)
        if resample.upper() not in Image.Resampling.__members__:
            names = ", ".join(Image.Resampling.__members__).lower()
            raise UserError(f"data.resample={resample} is not known: choose one of {names}")
        self.resample = resample

    def apply(self, img: np.ndarray, **params) -> np.ndarray:
        return _resized(img, self.size, Image.Resampling[self.resample.upper()])

    def apply_to_mask(self, mask: np.ndarray, *args, **params) -> np.ndarray:
        return _resized(mask, self.size, Image.Resampling.NEAREST)


class Crop(A.RandomCrop):
    """A random part of `size` (height, width): what a texture is trained on."""

    def __init__(self, size: int | Sequence[int], p: float = 1.0):
        self.size = pair(size)
        super().__init__(*self.size, p=p)

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        if height < self.size[0] or width < self.size[1]:
            crop = "×".join(map(str, self.size))
            raise UserError(
                f"data.image_size: the crops of {crop} that a texture is trained on don't fit into an image of "
                f"{height}×{width}; give a smaller one, a larger data.texture_size, or data.treatment=object"
            )
        return super().get_params_dependent_on_data(params, data)


class Tile(A.DualTransform):
    """A part of `size` (height, width) of an image's grid of tiles: in training, every copy of an image is a tile.

    `places` gives the (top, left) of an image's T tiles from its height and width. `copy` and `index` of the data, the
    copy's or epoch's number and the image's position, choose the tile (copy + index) mod T. The transforms that follow
    get copy // T as `copy` if `all_tiles` of the data is True, in training copy // T + copy mod T: epochs may be few.
    """

    def __init__(self, size: tuple[int, int], places: Callable[[int, int], list[tuple[int, int]]], p: float = 1.0):
        super().__init__(p=p)
        self.size, self.places = size, places

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        copy, places = data.get("copy", 0), self.places(*params["shape"][:2])
        following = copy // len(places) + (0 if data.get("all_tiles") else copy % len(places))
        return {"place": places[(copy + data.get("index", 0)) % len(places)], "following": following}

    @property
    def targets(self) -> dict[str, Callable[..., Any]]:
        return super().targets | {"copy": self.apply_to_copy}

    def apply_to_copy(self, copy: int, following: int = 0, **params) -> int:
        return following

    def apply(self, img: np.ndarray, place: tuple[int, int] = (0, 0), **params) -> np.ndarray:
        (top, left), (height, width) = place, self.size
        return np.ascontiguousarray(img[top : top + height, left : left + width])

    def apply_to_mask(self, mask: np.ndarray, *args, place: tuple[int, int] = (0, 0), **params) -> np.ndarray:
        return self.apply(mask, place)


class Turn(A.DualTransform):
    """Turn an image about its centre, by multiples of an angle or by random angles, in degrees.

    `copy` and `index` of the data are the number of the copy or epoch, and the training image's position. With `step`
    the angle is step · (copy + index): the multiples of `step` follow each other. Otherwise the first copy is not
    turned, and the others are turned by an angle drawn from `angles`. What comes in at the corners is the mirrored
    image, or black (`mirror` is False). Image uint8 [H, W, C], mask uint8 [H, W].
    """

    def __init__(
        self, step: float | None = None, angles: Sequence[float] = (0, 360), mirror: bool = True, p: float = 1.0
    ):
        super().__init__(p=p)
        self.step, self.angles, self.mirror = step, tuple(angles), mirror

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        copy, index = data.get("copy", 0), data.get("index", 0)
        if self.step is not None:
            return {"angle": self.step * (copy + index) % 360}
        return {"angle": self.py_random.uniform(*self.angles) if copy else 0.0}

    def apply(self, img: np.ndarray, angle: float = 0.0, **params) -> np.ndarray:
        return self._turned(img, angle, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, *args, angle: float = 0.0, **params) -> np.ndarray:
        return self._turned(mask, angle, cv2.INTER_NEAREST)

    def _turned(self, array: np.ndarray, angle: float, interpolation: int) -> np.ndarray:
        height, width = array.shape[:2]
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        border = cv2.BORDER_REFLECT_101 if self.mirror else cv2.BORDER_CONSTANT
        return cv2.warpAffine(array, matrix, (width, height), flags=interpolation, borderMode=border)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool mask at (height, width), by PIL's nearest, as `Resize` brings it there."""
    return mask if mask.shape == size else _resized(mask.astype(np.uint8), size, Image.Resampling.NEAREST) > 0


def _resized(array: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(array).resize(size[::-1], resample))


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or [height, width]; raises UserError unless both are positive."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"data.image_size={size} must be a positive number of pixels or [height, width]")
    return sides
