"""From a loaded image to the tensors of a batch: the transforms of the configuration, then normalisation."""

import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch import Tensor

from anomalib_lite.data.samples import load_rgb
from anomalib_lite.data.transforms import Resize
from anomalib_lite.errors import UserError

NORMALIZE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


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
