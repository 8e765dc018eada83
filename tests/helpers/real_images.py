"""Where the real images and weights lie that tests marked `real` use: ANOMALIB_LITE_DATA, or the test is skipped.

It names a folder that holds `parts/` (MVTec layout) and `visa/`, or one with such a folder `data/` in it;
`weights/` lies beside or in it.
"""

import os
from pathlib import Path

import pytest


def _data() -> Path:
    named = os.environ.get("ANOMALIB_LITE_DATA")
    if not named:
        pytest.skip("ANOMALIB_LITE_DATA is not set")
    folder = Path(named).expanduser()
    return folder / "data" if (folder / "data").is_dir() else folder


def _there(*places: Path) -> Path:
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"no {places[0].name} under ANOMALIB_LITE_DATA")


def parts() -> Path:
    """The root in the MVTec layout: bottle, toothbrush, magnetic_tile."""
    return _there(_data() / "parts")


def visa() -> Path:
    """The root in VisA's raw layout: capsules."""
    return _there(_data() / "visa")


def weights() -> Path:
    """The folder of local backbone weights."""
    return _there(_data().parent / "weights", _data() / "weights")
