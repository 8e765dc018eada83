"""How images become what a method sees: objects are resized, textures are cropped, large images are cut into tiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.transforms import Crop, Resize, Tile, pair

#: The textures that data.treatment=auto knows, by the name of the data set.
TEXTURES = {
    "mvtec": {"carpet", "grid", "leather", "tile", "wood"},
    "synthetic": {"fabric", "wood"},
}


def is_texture(treatment: str, dataset: str | None, categories: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a run treats its categories as textures, and notes for the result.

    One model has one treatment: with `auto` all categories must be known textures.
    """
    known = [name for name in categories if name in TEXTURES.get(dataset or "", ())]
    if treatment != "auto" or not known:
        return treatment == "texture", []
    if len(known) < len(categories):
        note = f"data.treatment=auto: {', '.join(known)} treated as objects, as the other categories are"
        return False, [note]
    return True, []


class Prepared(NamedTuple):
    """Whether images are treated as textures; the (H, W) of images in test, or "original", where each has its own; the
    pipelines of test and of training; and notes for the result.
    """

    texture: bool
    test_size: tuple[int, int] | str
    test: Pipeline
    train: Pipeline
    notes: list[str]


def prepare(data: Any, categories: Sequence[str]) -> Prepared:
    """How a run prepares images of these categories.

    The pipelines are one object where training prepares images as test does: features are stored for one pipeline.

    Args:
        data: the DataModule, whose arguments decide.
    """
    chosen = data.transform is not None or data.tiling is not None
    texture, notes = is_texture(
        "object" if data.treatment == "auto" and chosen else data.treatment, data.name, categories
    )
    size: tuple[int, int] | str = data.image_size
    cut: list[Any] = []
    if texture:
        size = "original" if data.texture_size == "original" else pair(data.texture_size)
        cut = [Crop(data.image_size)]
    elif data.tiling:
        size, cut = data.tiling.image_size, [Tile(data.image_size, data.tiling.places)]
    transform = data.transform
    if transform is None:
        transform = [] if isinstance(size, str) else [Resize(size, data.resample)]
    values = {"normalize": data.normalize, "value_range": data.pixels.value_range}
    test = Pipeline(transform, **values, check_size=data.tiling.axes if data.tiling else None)
    # a user's `augment` stays as it is, for Pipeline to judge, where nothing comes before it
    augment = [*cut, *data.augment] if cut else data.augment
    train = Pipeline(transform, augment, **values) if augment else test
    return Prepared(texture, size, test, train, notes)
