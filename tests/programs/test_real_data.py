import time

import pytest

from anomalib_lite.data.integrity import check
from anomalib_lite.data.readers import read_folder, read_mvtec, read_visa
from tests.helpers import real_images as real

pytestmark = pytest.mark.real


def counts(data):
    labels = [s.label for s in data.test]
    return len(data.train), labels.count(0), labels.count(1)


def test_bottle_is_official():
    data = read_mvtec(real.parts(), "bottle")
    assert counts(data) == (209, 20, 63)
    assert data.notes == []
    assert check(data, thorough=True)[1] == []


def test_toothbrush_is_another_split():
    data = read_mvtec(real.parts(), "toothbrush")
    assert counts(data) == (48, 12, 30)
    assert data.notes == ["toothbrush: 48 train images, officially 60"]


def test_mvtec_all_is_what_is_there():
    data = read_mvtec(real.parts(), "all")
    assert {s.category for s in data.train} == {"bottle", "toothbrush"}
    assert data.notes[-1].startswith("13 of MVTec AD's 15 categories are not on disk")


def test_magnetic_tile_has_empty_masks():
    data = read_folder(real.parts(), "magnetic_tile")
    assert counts(data) == (300, 100, 392)
    assert check(data)[1] == []
    assert any(note.startswith("magnetic_tile: 4 of 392 masks are empty") for note in check(data, thorough=True)[1])


def test_capsules_are_official():
    data = read_visa(real.visa(), "capsules")
    assert counts(data) == (542, 60, 100)
    assert data.notes == []
    assert all(s.mask for s in data.test if s.label)


def test_fast_check_is_fast():
    data = read_folder(real.parts(), "all")
    start = time.perf_counter()
    check(data)
    files = sum(1 + (s.mask is not None) for s in data.train + data.test)
    assert (time.perf_counter() - start) / files < 2e-3  # about 0.2 ms a file; 10,000 files in a few seconds
