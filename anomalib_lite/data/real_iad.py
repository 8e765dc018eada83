"""Reader of Real-IAD (Wang et al., CVPR 2024), whose protocols are folders of JSON files: CATEGORY.json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.data.mvtec_layout import choose, existing_root
from anomalib_lite.data.reader_notes import KINDS, absent_notes, total_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.data.tables import file_below, listed
from anomalib_lite.errors import UserError

CATEGORIES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base", "sim_card_set",
    "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb", "usb_adaptor",
    "vcpill", "wooden_beads", "woodstick", "zipper",
)  # fmt: skip
#: images of all categories: train, normal test, defective test. The lists themselves are the official split of each.
TOTALS = {"realiad_jsons": (36465, 63256, 51329), "realiad_jsons_sv": (10408, 10387, 9415)}


def read_real_iad(
    root: str | Path | None,
    category: str | Sequence[str],
    images: str = "realiad_1024",
    split_json: str = "realiad_jsons",
) -> DataSet:
    """The images that the lists of a protocol name.

    Args:
        images: the folder below the root that holds the images, CATEGORY/{OK,NG}/...; "." is the root.
        split_json: the folder with the lists, below the root or below its `realiad_jsons`: `realiad_jsons` for all five
            views, `realiad_jsons_sv` for the single view, `realiad_jsons_fuiad_0.1` with defects among the training
            images, which are left out with a note.

    Raises:
        UserError: a folder, a list or an image is missing, or a list can't be read.
    """
    base = existing_root(root)
    pictures, lists = base / images, _lists(base, split_json)
    if not pictures.is_dir():
        raise UserError(
            f"{pictures}: no such folder; data.reader.images names the one with the images, below data.root"
        )
    available = [name for name in lists if (pictures / name).is_dir()]
    names = choose(category, available, base, f"; none of {pictures}/CATEGORY has a list in data.reader.split_json")

    def entries() -> Iterator[tuple[str, str, Sample]]:
        for name in names:
            content = _content(lists[name])
            for part in ("train", "test"):
                for number, entry in enumerate(content[part]):
                    where = f"{lists[name]} {part}[{number}]"
                    yield where, part, _sample(pictures, name, entry, content["meta"], where)

    data = listed(base, names, entries(), lists[names[0]].parent)
    if category == "all":
        data.notes += absent_notes(data, CATEGORIES, "Real-IAD")
    if set(names) == set(CATEGORIES) and (official := TOTALS.get(Path(split_json).name)):
        defective = sum(sample.label for sample in data.test)
        counts = len(data.train), len(data.test) - defective, defective
        data.notes += total_notes("Real-IAD", dict(zip(KINDS, counts, strict=True)), official)
    return data


def _lists(base: Path, split_json: str) -> dict[str, Path]:
    """{category: its list}."""
    places = [base / split_json, base / "realiad_jsons" / split_json]
    for place in places:
        if found := {file.stem: file for file in sorted(place.glob("*.json"))}:
            return found
    raise UserError(
        f"{places[0]}: no CATEGORY.json there, nor in {places[1]}; data.reader.split_json names the folder of a "
        "protocol's lists, below data.root"
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(entry, dict) for part in ("train", "test") for entry in content[part]):
            raise TypeError("an entry is no object")
        return {"meta": {}} | content
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: not Real-IAD's lists train and test ({type(error).__name__}: {error}); restore the file"
        ) from None


def _sample(pictures: Path, category: str, entry: dict[str, Any], meta: dict[str, Any], where: str) -> Sample:
    """An entry's label decides: normal views of defective objects lie below NG."""
    kind = entry.get("anomaly_class")
    label = int(kind != meta.get("normal_class", "OK"))
    paths = [entry.get(key) for key in (("image_path", "mask_path") if label else ("image_path",))]
    if not all(isinstance(text, str) and text for text in (kind, *paths)):
        raise UserError(
            f"{where}: needs anomaly_class and image_path, and mask_path if it is defective; correct the entry"
        )
    found = [file_below(pictures, Path(meta.get("prefix", category), str(path)), where) for path in paths]
    return Sample(found[0], category, str(kind) if label else "good", label, found[1] if label else None)
