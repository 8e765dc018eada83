"""The saturated per-region overlap against a literal one, and against AUPRO where nothing is saturated early."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from anomalib_lite.metrics import spro
from anomalib_lite.metrics.functional import pixel_metrics
from anomalib_lite.metrics.spro import Region, spro_metrics
from tests.helpers.slow_spro import slow_spro
from tests.unit.test_metrics import KINDS, blobs, draw


def of(maps, regions, *limits):
    """sPRO up to these limits, or up to the default one."""
    return spro_metrics(lambda: zip(maps, regions, strict=True), *[limits] * bool(limits))


def components(masks):
    """One region for each 8-connected component, which is found when its whole area is."""
    found = []
    for mask in masks:
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        found.append([Region(label == i, (label == i).sum()) for i in range(1, count + 1)])
    return found


def drawn_regions(rng, masks):
    """Regions that overlap, of several parts, with saturations that are whole, fractional or larger than the region."""
    regions = []
    for mask in masks:
        parts = [mask, ndimage.shift(mask.astype(np.uint8), 2, order=0) > 0] if mask.any() else []
        shares = rng.choice([0.013, 0.3, 0.5, 1.0, 1.7], len(parts))
        regions.append([Region(m, max(s * m.sum(), 0.4)) for m, s in zip(parts, shares, strict=True)])
    return regions


@pytest.mark.parametrize("kind", KINDS)
def test_equals_slow(kind):
    rng = np.random.default_rng(3)
    masks = blobs(rng, 4, 11, 17, share=0.3)
    maps = draw(kind, rng, masks)
    regions = drawn_regions(rng, masks)
    limits = (0.3, 0.05, 0.123, 1.0)
    got = of(maps, regions, *limits)
    assert list(got) == ["spro_30", "spro_05", "spro_123", "spro_100"]
    reference = [[(m, min(s, m.sum())) for m, s in found] for found in regions]
    expected = [slow_spro(maps, reference, limit) for limit in limits]
    np.testing.assert_allclose(np.array([*got.values()], float), expected, rtol=0, atol=1e-9)


def test_is_aupro_without_saturation():
    rng = np.random.default_rng(0)
    masks = blobs(rng, 6, 40, 40)
    for kind in ("random", "half tied"):
        maps = draw(kind, rng, masks)
        aupro = pixel_metrics(maps, masks, (0.3, 0.05))
        found = of(maps, components(masks), 0.3, 0.05)
        assert found["spro_30"] == pytest.approx(aupro["aupro_30"], abs=1e-12)
        assert found["spro_05"] == pytest.approx(aupro["aupro_05"], abs=1e-12)


def test_order_and_scale_change_no_bit():
    rng = np.random.default_rng(1)
    masks = blobs(rng, 6, 20, 20)
    maps, regions = draw("half tied", rng, masks), drawn_regions(rng, masks)
    expected = of(maps, regions, 0.3)
    order = rng.permutation(len(maps))
    assert of([maps[i] for i in order], [regions[i][::-1] for i in order], 0.3) == expected
    assert of([4 * maps[i] + 8 for i in order], [regions[i] for i in order], 0.3) == expected
    sizes = [np.pad(m, ((0, i), (0, 0)), constant_values=m.min() - 1) for i, m in enumerate(maps)]
    padded = [[Region(np.pad(r.mask, ((0, i), (0, 0))), r.saturation) for r in regions[i]] for i in range(len(maps))]
    assert of(sizes, padded, 0.3)["spro_30"] is not None


def test_memory_does_not_grow_with_the_images(monkeypatch):
    """Maps and masks are read image by image, and normal pixels counted in parts, which change no bit."""
    count = 200

    def images():
        for seed in range(count):
            amap = np.random.default_rng(seed).random((64, 64), np.float32)
            yield amap, [Region(amap > 0.99, 20)]

    expected = of(*zip(*images(), strict=True), 0.05, 0.3)
    monkeypatch.setattr(spro, "PART", 4 * 64 * 64)
    tracemalloc.start()
    assert spro_metrics(images, (0.05, 0.3)) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * 64 * 64 * 4 / 2  # half of the bytes of the maps


def test_saturation_is_enough():
    """Half of a region is found before any normal pixel: with that as its saturation it is found wholly."""
    amap, mask = np.zeros((4, 4), np.float32), np.zeros((4, 4), bool)
    mask[:2] = True
    amap[0] = 2
    amap[2:] = 1  # normal pixels above the other half
    assert of([amap], [[Region(mask, 4)]], 0.05, 1.0) == {"spro_05": 1.0, "spro_100": 1.0}
    assert of([amap], [[Region(mask, 8)]]) == {"spro_05": 0.5}
    assert of([amap], [[Region(mask, 5)]]) == {"spro_05": pytest.approx(0.8, abs=1e-12)}
    assert of([amap], [[Region(mask, 2.5)]]) == {"spro_05": 1.0}


def test_nothing_to_measure():
    amap, mask = np.zeros((4, 4)), np.ones((4, 4), bool)
    assert of([amap], [[]]) == {"spro_05": None}
    assert of([amap], [[Region(mask, 1)]]) == {"spro_05": None}
