"""Images that are stored once: in memory, in a file without a name, and as bits."""

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomalib_lite.data.samples import Sample
from anomalib_lite.errors import UserError
from anomalib_lite.metrics import image_store, vertices
from anomalib_lite.metrics.functional import pixel_metrics
from anomalib_lite.metrics.image_store import ImageStore
from anomalib_lite.metrics.per_category import measure_categories
from anomalib_lite.runs.test_outputs import NORMAL, TEST, Evaluation, scored_for_thresholds


def batches(dtype: Any) -> list[np.ndarray]:
    """Of several sizes, which are no multiples of 8; one of them all zero."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((count, 3 + count, 5)) for count in (4, 1, 3, 2)]
    drawn[2][:] = 0
    return [batch.astype(dtype) if dtype is not bool else batch > 0.5 for batch in drawn]


@pytest.mark.parametrize("limit", [0, 100, 2**30])
@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_what_is_stored_comes_back(dtype, limit, tmp_path):
    store, images = ImageStore(dtype, tmp_path, limit), batches(dtype)
    for batch in images:
        store.add(batch)
    expected = [image for batch in images for image in batch]
    assert (store.dtype, len(store)) == (dtype, 10)
    assert (store.file is None) == (limit == 2**30 or (dtype is bool and limit == 100))
    assert list(tmp_path.iterdir()) == []  # no name: gone whenever the process ends
    for found, image in zip(store, expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, image)
    for number, batch in enumerate(images):
        np.testing.assert_array_equal(store.batch(number), batch)
    more = store.extended()
    more.add(images[0])
    some = more.ordered([11, 0, 7])
    for found, image in zip(some, [images[0][1], expected[0], expected[7]], strict=True):
        np.testing.assert_array_equal(found, image)
    assert len(store) == 10
    with pytest.raises(IndexError):
        store[10]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Path("/dev/full").open("r+b", 0))  # noqa: SIM115
    store = ImageStore(np.float32, tmp_path, 0)
    with pytest.raises(UserError, match=r"no room for the anomaly maps .*No space left.*scoring\.map_size"):
        store.add(np.zeros((1, 4, 4), np.float32))


@pytest.mark.parametrize("limit", [0, 2**30])
def test_gaps_are_given_back_while_images_are_added(limit, tmp_path, monkeypatch):
    """Of 40 batches of 800 bytes, after each 3,000 bytes."""
    trimmed: list[int] = []
    store = ImageStore(np.float32, tmp_path, limit)
    monkeypatch.setattr(image_store, "_TRIMMED", 3000)
    monkeypatch.setattr(image_store, "return_freed_memory", lambda: trimmed.append(store.used))
    for _ in range(40):
        store.add(np.zeros((2, 10, 10), np.float32))
    assert [used // 3000 for used in trimmed] == list(range(1, 11))
    monkeypatch.undo()
    image_store.return_freed_memory()


def test_metrics_of_maps_in_a_file(tmp_path, monkeypatch):
    """And of many chunks: the same bits."""
    rng = np.random.default_rng(1)
    maps = np.round(rng.standard_normal((9, 20, 30)), 1).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[3:, 4:9, 5:9] = True
    expected = pixel_metrics(maps, masks)
    stores = ImageStore(np.float32, tmp_path, 0), ImageStore(bool, tmp_path, 0)
    for store, images in zip(stores, (maps, masks), strict=True):
        store.add(images)
    monkeypatch.setattr(vertices, "_SORTED", 700)
    monkeypatch.setattr(vertices, "_LOOKED_UP", 16)
    assert pixel_metrics(*stores) == expected


def evaluate(count: int, folder: Path, side: int = 64) -> tuple[int, int]:
    """Bytes that an evaluation of `count` images holds before its metrics, and more at their peak."""
    evaluation, rng = Evaluation(folder), np.random.default_rng(0)
    samples = [
        Sample(Path(f"{i}.png"), "part", ("good", "cut", "hole")[i % 3], int(i % 3 > 0), None) for i in range(count)
    ]
    gc.collect()
    tracemalloc.start()
    for start in range(0, count, 10):
        index = torch.arange(start, min(start + 10, count))
        mask = torch.zeros(len(index), side, side, dtype=torch.bool)
        mask[index % 3 > 0, 8:12, 8:16] = True
        maps = torch.from_numpy(rng.standard_normal(mask.shape, np.float32)) + mask
        batch = {"index": index, "label": (index % 3 > 0).long(), "mask": mask, "path": ["?"] * len(index)}
        evaluation.on_test_batch_end(None, None, {"map": maps, "score": maps.amax((1, 2))}, batch, 0, TEST)  # type: ignore[arg-type]
    outputs = evaluation.gather({TEST: samples, NORMAL: [], 2: []}, Path())[TEST]
    held = tracemalloc.get_traced_memory()[0]
    held += sum(batch.rows.nbytes for batch in outputs["maps"].batches)  # torch has allocated them, which is not traced
    tracemalloc.reset_peak()
    measure_categories(outputs, {"part": True}, [0.3], {"part": {"pixel": 1.0}})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held, peak - held


def test_memory_hardly_grows_with_images(tmp_path, monkeypatch):
    """Beyond the limit a map costs no memory; masks cost a bit per pixel, and metrics the pixels of defects."""
    monkeypatch.setattr(image_store, "MEMORY", 2**20)
    monkeypatch.setattr("anomalib_lite.metrics.gather.MEMORY", 2**20)
    monkeypatch.setattr(vertices, "_SORTED", 2**17)
    evaluate(10, tmp_path)
    few, many = evaluate(100, tmp_path), evaluate(250, tmp_path)
    per_image = [(b - a) / 150 for a, b in zip(few, many, strict=True)]
    assert per_image[0] < 64 * 64 / 8 + 1500  # the map alone has 64 * 64 * 4
    assert (
        per_image[1] < 64 * 64 * 2
    )  # for 32 defective pixels in two of three images; a copy of the map has twice that


def test_a_map_or_score_that_is_not_finite():
    evaluation, maps = Evaluation(), torch.zeros(3, 4, 4)
    maps[1, 2, 2] = torch.inf
    numbers = {"index": torch.arange(3), "label": torch.zeros(3, dtype=torch.long), "path": ["a", "b", "c"]}
    scores = torch.tensor([0, torch.nan, 0])
    for outputs in ({"map": maps}, {"map": list(maps)}, {"map": torch.zeros(3, 4, 4), "score": scores}):
        with pytest.raises(ValueError, match="the anomaly map or score of b is not finite"):
            evaluation.on_test_batch_end(None, None, {"score": torch.zeros(3)} | outputs, numbers, 0, NORMAL)  # type: ignore[arg-type]


def test_images_that_thresholds_come_from():
    samples = [Sample(Path(f"{i}.png"), "ab"[i % 5 == 0], "good", int(i == 7), None) for i in range(50)]
    every = list(range(50))
    assert scored_for_thresholds(samples, None, 0) == scored_for_thresholds(samples, 39, 0) == every
    chosen = scored_for_thresholds(samples, 20, 0)
    assert chosen == sorted(set(chosen))
    assert [i for i in chosen if i % 5 == 0] == every[::5]  # of the smaller category all
    assert len(chosen) == 30
    assert 7 not in chosen  # it is defective
    assert scored_for_thresholds(samples, 20, 1) != chosen == scored_for_thresholds(samples, 20, 0)
