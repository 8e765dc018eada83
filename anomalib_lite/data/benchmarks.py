"""Readers of benchmarks with a folder per category, in the MVTec layout or in a variant of it.

The official counts (train, normal test, defective test) are those that repositories state of the papers' tables and of
the archives. Those of BTAD's training images are confirmed by their total alone.
"""

from collections.abc import Sequence
from pathlib import Path

from anomalib_lite.data.mvtec_layout import LAYOUTS
from anomalib_lite.data.reader_notes import Counts
from anomalib_lite.data.readers import read_official
from anomalib_lite.data.samples import DataSet

# fmt: off
MVTEC_AD_2: Counts = {
    "can": (412, 72, 90), "fabric": (387, 66, 90), "fruit_jelly": (263, 20, 60), "rice": (313, 42, 90),
    "sheet_metal": (137, 24, 90), "vial": (291, 35, 105), "wallplugs": (293, 60, 90), "walnuts": (432, 60, 90),
}
# The paper's text speaks of 1,772 training images. The archive has these 1,778.
MVTEC_LOCO: Counts = {
    "breakfast_box": (351, 102, 173), "juice_bottle": (335, 94, 236), "pushpins": (372, 138, 172),
    "screw_bag": (360, 122, 219), "splicing_connectors": (360, 119, 193),
}
BTAD: Counts = {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)}
MPDD: Counts = {
    "bracket_black": (289, 32, 47), "bracket_brown": (185, 26, 51), "bracket_white": (110, 30, 30),
    "connector": (128, 30, 14), "metal_plate": (54, 26, 71), "tubes": (122, 32, 69),
}
# fmt: on


def read_mvtec_ad_2(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """MVTec AD 2 (Heckler-Kram et al., arXiv 2503.21622): CATEGORY/{train/good, test_public/{good, bad}}.

    Its validation images and the private test images, which have no labels, are not used; notes say so.
    """
    return read_official(root, category, MVTEC_AD_2, "MVTec AD 2", LAYOUTS["mvtec_ad_2"])


def read_mvtec_loco(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """MVTec LOCO AD (Bergmann et al., IJCV 2022), with logical_anomalies and structural_anomalies as kinds of defects.

    An image's mask is the folder of its defects' masks; defects_config.json gives their saturation thresholds.
    """
    return read_official(root, category, MVTEC_LOCO, "MVTec LOCO", LAYOUTS["mvtec_loco"])


def read_btad(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """BTAD (Mishra et al., ISIE 2021): CATEGORY/{train/ok, test/{ok, ko}, ground_truth/ko}."""
    return read_official(root, category, BTAD, "BTAD", LAYOUTS["btad"])


def read_mpdd(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """MPDD (Jezek et al., ICUMT 2021), in the MVTec layout."""
    return read_official(root, category, MPDD, "MPDD")
