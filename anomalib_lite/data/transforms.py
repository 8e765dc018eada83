"""From a loaded image to the tensors of a batch. The only module that imports albumentations."""

import os
import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it would ask the network for its newest version

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anomalib_lite.data.samples import load_rgb
from anomalib_lite.errors import UserError

NORMALIZE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


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

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("size", "resample")


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

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("size",)


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

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("size", "places")


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

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("step", "angles", "mirror")


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


def parts(transforms: Sequence[Any]) -> list[Any]:
    """The transforms and those inside of them, as of OneOf."""
    return [part for each in transforms for part in (each, *parts(getattr(each, "transforms", ())))]


def transform_error(key: str, transform: Any, error: Exception) -> UserError:
    """The error for a transform that raises an exception."""
    why = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{key}: {type(transform).__name__} can't be applied ({why}); change its options, or remove it")


class Pipeline:
    """Call with an image and its mask to get their tensors: albumentations transforms, then normalisation.

    `transforms` are of every image, `augment` of training images. `normalize` is "imagenet" (its mean and standard
    deviation), "none" ([0, 1]), or {"mean": [R, G, B], "std": [R, G, B]} of images in [0, 1]. `value_range` is that of
    the files with more than 8 bits per channel, which `load` brings to 8 bits. `check_size` raises UserError for the
    height and width of a transformed image that the method can't take. Raises UserError for what is no list of
    transforms, and for an unknown `normalize`.
    """

    def __init__(
        self,
        transforms: Sequence,
        augment: Sequence = (),
        normalize: str | dict[str, Sequence[float]] = "imagenet",
        value_range: tuple[float, float] | None = None,
        check_size: Callable[[int, int], Any] | None = None,
    ):
        if not isinstance(normalize, dict) and normalize not in NORMALIZE:
            raise UserError(
                f"data.normalize={normalize} is not known: choose one of {', '.join(NORMALIZE)}, or give mean and std"
            )
        kinds = A.BasicTransform | A.BaseCompose
        for option, value in (("transform", transforms), ("augment", augment)):
            if not isinstance(value, Sequence) or not all(isinstance(each, kinds) for each in value):
                raise UserError(f"data.{option}={value} must be a list of albumentations transforms, each a _target_")
        self.compose = A.Compose([*transforms, *augment])
        #: the resizing, where it is all that comes before `augment`; `transform` then also takes resized images
        self.resize = transforms[0] if len(transforms) == 1 and isinstance(transforms[0], Resize) else None
        self.after_resize = A.Compose(list(augment))
        #: whether every part of an image stays where it was, so that masks can be resized from their own size
        self.only_resizes = all(isinstance(each, Resize) for each in transforms)
        self.steps = [("data.transform", each) for each in transforms] + [("data.augment", each) for each in augment]
        mean, std = (normalize["mean"], normalize["std"]) if isinstance(normalize, dict) else NORMALIZE[normalize]
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.on_device = dict[torch.device, list[Tensor]]()  # 255 and both of them, where `normalised` has been used
        self.value_range, self.check_size = value_range, check_size

    def load(self, path: Path) -> np.ndarray:
        """The file's image, uint8 [H, W, 3], in the run's range of values; UserError if it can't be decoded."""
        return load_rgb(path, self.value_range)

    def shown(self, path: Path) -> np.ndarray:
        """The image that a map covers, uint8 [h, w, 3]: the file's, or the transformed one if not `only_resizes`."""
        image = self.load(path)
        return image if self.only_resizes else self.transform(image, np.zeros(image.shape[:2], bool), (0,))[0]

    def description(self) -> dict[str, Any]:
        """All settings that decide the output, as plain Python; NotImplementedError if a transform can't list them."""
        normalize = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        values = {} if self.value_range is None else {"value_range": list(self.value_range)}
        return {"transforms": A.to_dict(self.compose)["transform"], "normalize": normalize} | values

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
        """Image uint8 [H, W, 3] and mask bool [H, W] to float32 [3, h, w] and bool [h, w].

        Equal seeds (a few non-negative integers) give equal augmentations; of four, the last two are the number of the
        epoch or copy, and the image's position, which `Turn` asks for.
        """
        image, mask = self.transform(image, mask, seed)
        return self.tensor(image), torch.from_numpy(np.ascontiguousarray(mask))

    def transform(
        self, image: np.ndarray, mask: np.ndarray, seed: Sequence[int], resized: bool = False, all_tiles: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The albumentations part: uint8 [h, w, 3], bool [h, w]. `resized`: after `resize`. `all_tiles`: see `Tile`."""
        # Not Compose.set_random_seed: it gives every transform a generator of the same seed, so that two flips with
        # p=0.5 always agree. One shared generator makes them independent.
        rng = np.random.default_rng(list(seed))
        copy, index = seed[2:4] if len(seed) == 4 else (0, 0)
        compose = self.after_resize if resized else self.compose
        compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        try:
            done = compose(image=image, mask=mask.astype(np.uint8), copy=copy, index=index, all_tiles=all_tiles)
        except UserError:
            raise
        except Exception as error:
            frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            failed = next((each for each in reversed(frames) if isinstance(each, A.BasicTransform)), compose)
            augmented = failed in parts([each for key, each in self.steps if key == "data.augment"])
            raise transform_error("data.augment" if augmented else "data.transform", failed, error) from None
        image, mask = done["image"], done["mask"] > 0
        if image.dtype != np.uint8 or image.shape != (*mask.shape, 3):
            raise UserError(
                f"data.transform and data.augment must leave a uint8 image [H, W, 3], not {image.dtype} {image.shape}; "
                "leave normalisation to data.normalize"
            )
        if self.check_size is not None:
            self.check_size(*mask.shape)
        return image, mask

    def normalised(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3] to `tensor`'s output [B, 3, H, W], on their device, to the last bit."""
        if images.device not in self.on_device:
            constants = torch.tensor(255.0), self.mean, self.std  # a GPU multiplies by a plain number's reciprocal
            self.on_device[images.device] = [constant.to(images.device) for constant in constants]
        largest, mean, std = self.on_device[images.device]
        return images.movedim(-1, 1).contiguous().float().div_(largest).sub_(mean).div_(std)

    def denormalise(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] back to [0, 1]."""
        return images * self.std.to(images) + self.mean.to(images)

    def tensor(self, image: np.ndarray) -> Tensor:
        """Image uint8 [H, W, 3] to float32 [3, H, W], normalised."""
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
        return tensor.sub_(self.mean).div_(self.std)
