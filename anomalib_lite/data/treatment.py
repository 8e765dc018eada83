"""Whether categories are textures, which are trained on crops, or objects, which are resized."""

from collections.abc import Sequence

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
