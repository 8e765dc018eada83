"""AUPIMO, IoU and Dice against literal formulas, and the keys of AUPRO at any limit."""

from typing import Any

import numpy as np
import pytest

from anomalib_lite.metrics.aupimo import BOUNDS, _Rates, aupimo, enough_pixels
from anomalib_lite.metrics.functional import image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.names import name_of, overlap_key
from anomalib_lite.metrics.overlap import overlap_metrics
from anomalib_lite.metrics.per_category import mean_metrics, measure_categories, thresholds
from anomalib_lite.metrics.vertices import Pixels
from tests.unit.test_metrics import KINDS, blobs, cut, draw

WIDE = (0.01, 0.3)  # bounds that images of a few pixels can reach


def slow_aupimo(maps, masks, labels, bounds):
    """Literally: every distinct score is a threshold, and the straight lines between them are integrated in 400,000
    steps over log F."""
    maps = [np.asarray(amap, float) for amap in maps]
    levels = np.unique(np.concatenate([amap.ravel() for amap in maps]))[::-1]
    normal = [amap for amap, label in zip(maps, labels, strict=True) if not label]
    rate = np.array([0.0] + [np.mean([(amap >= t).mean() for amap in normal]) for t in levels])
    steps = np.linspace(np.log(bounds[0]), np.log(bounds[1]), 400_001)
    middle = np.exp((steps[1:] + steps[:-1]) / 2)
    areas = []
    for amap, mask, label in zip(maps, masks, labels, strict=True):
        if label and mask.any():
            overlap = np.array([0.0] + [(amap[mask != 0] >= t).mean() for t in levels])
            last = np.flatnonzero(np.append(np.diff(rate) > 0, True))  # a vertical step ends at its upper end
            start = np.flatnonzero(np.append(True, np.diff(rate) > 0))
            x, y = np.sort(np.append(rate[last], rate[start])), np.sort(np.append(overlap[last], overlap[start]))
            areas.append(np.interp(middle, x, y).mean())
    return np.mean(areas)


def images(seed, share=0.2, shape=(11, 17)):
    """Six defective and three good images."""
    rng = np.random.default_rng(seed)
    masks = blobs(rng, 9, shape[0], shape[1], share)
    return rng, masks, masks.any(axis=(1, 2)).astype(int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_aupimo_equals_slow(kind, seed):
    rng, masks, labels = images(seed, share=(0.1, 0.5)[seed])
    maps = draw(kind, rng, masks)
    assert aupimo(maps, masks, labels, WIDE) == pytest.approx(slow_aupimo(maps, masks, labels, WIDE), abs=2e-6)


def test_aupimo_of_other_sizes_is_the_mean_of_the_images_own_rates():
    rng, masks, labels = images(3)
    maps = draw("half tied", rng, masks)
    sizes = [(slice(0, 5 + i % 3 * 3), slice(0, 17 - i)) for i in range(9)]
    maps, masks = ([each[size] for each, size in zip(x, sizes, strict=True)] for x in (list(maps), list(masks)))
    expected = slow_aupimo(maps, masks, labels, WIDE)
    assert aupimo(maps, masks, labels, WIDE) == pytest.approx(expected, abs=2e-6)
    order = rng.permutation(9)
    again = aupimo([maps[i] for i in order], [masks[i] for i in order], labels[order], WIDE)
    assert again == aupimo(maps, masks, labels, WIDE)


@pytest.mark.parametrize("kind", ["random", "tied", "half tied"])
def test_aupimo_does_not_change_by_a_bit(kind):
    rng, masks, labels = images(4, shape=(30, 40))
    maps = draw(kind, rng, masks)
    expected = aupimo(maps, masks, labels, WIDE)
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    for same in (maps.astype(float), np.exp(maps.astype(float)), ranks, (ranks - ranks.max()).astype(np.float32)):
        assert aupimo(same, masks, labels, WIDE) == expected
    for _ in range(5):
        order = rng.permutation(9)
        assert aupimo(maps[order], masks[order], labels[order], WIDE) == expected
    assert aupimo(maps[:, ::-1], masks[:, ::-1], labels, WIDE) == expected
    assert aupimo(list(maps), list(masks.astype(np.uint8) * 255), labels.astype(bool), WIDE) == expected


def test_known_values_of_aupimo():
    masks = np.zeros((6, 400, 500), np.uint8)
    masks[3:5, 10:20, 10:20] = 1
    labels = np.array([0, 0, 0, 1, 1, 1])  # the last one has no mask: it is left out, and it is no good image
    maps = np.zeros(masks.shape)
    maps[3, 10:20, 10:15] = 1  # half of one defect, nothing of the other
    chance = (BOUNDS[1] - BOUNDS[0]) / np.log(10)
    assert aupimo(maps, masks, labels) == pytest.approx(0.25 + 0.75 * chance, abs=1e-12)
    maps[5] = 2
    assert aupimo(maps, masks, labels) == pytest.approx(0.25 + 0.75 * chance, abs=1e-12)
    maps[0, 0, :19] = 3  # 19 of 600,000 good pixels come before: half of the range of log F from 1e-5 is left
    left = np.log(BOUNDS[1] / (19 / 600_000)) / np.log(10)
    assert aupimo(maps, masks, labels) == pytest.approx(0.25 * left, abs=1e-4)
    constant = aupimo(np.ones(masks.shape), masks, labels)
    assert constant == pytest.approx(chance, abs=1e-12)
    assert aupimo(masks, masks, labels) == pytest.approx(1, abs=1e-12)


def test_many_good_images():
    """So many that one of them alone does not reach the upper bound."""
    rng = np.random.default_rng(5)
    masks = np.zeros((60, 6, 6), bool)
    masks[50:, 2:4, 2:4] = True
    maps, labels = draw("half tied", rng, masks), np.arange(60) >= 50
    for bounds in ((0.005, 0.019), (0.01, 0.02), (0.02, 0.5), (0.3, 1)):
        if enough_pixels([36] * 50, bounds):
            assert aupimo(maps, masks, labels, bounds) == pytest.approx(
                slow_aupimo(maps, masks, labels, bounds), abs=2e-6
            )


def test_few_pixels_of_many_good_images_are_held():
    """Those up to a rate that reaches the upper bound, also where one image alone can't reach it."""
    maps = np.random.default_rng(6).uniform(size=(101, 20, 20))
    upper = 0.02
    rates = _Rates(Pixels(maps, np.zeros(maps.shape)), range(101), upper)
    assert rates.at(np.array([rates.least]), "left") >= upper
    assert sum(len(scores) for _, scores in rates.scores) < 3 * upper * maps.size


def test_aupimo_that_cant_be_computed():
    _, masks, labels = images(0)
    assert aupimo(masks, masks, labels) is None  # 561 good pixels have no rate of 1e-5
    assert aupimo(masks, masks, np.ones(9), WIDE) is None
    assert aupimo(masks, np.zeros(masks.shape), labels, WIDE) is None
    with pytest.raises(ValueError, match="bounds must be"):
        aupimo(masks, masks, labels, (0, 1))
    with pytest.raises(ValueError, match="NaN"):
        aupimo(np.full(masks.shape, np.nan), masks, labels, WIDE)
    assert not enough_pixels([333_333])
    assert enough_pixels([333_333, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_equals_the_formula(kind):
    rng, masks, _ = images(1)
    maps = draw(kind, rng, masks)
    for threshold in (0.3, 1.0, float(np.quantile(maps.astype(float), 0.9))):
        found = maps.astype(float) > threshold
        iou = (found & masks).sum() / (found | masks).sum()
        got = overlap_metrics(maps, masks, threshold)
        assert got == pytest.approx({"pixel_iou": iou, "pixel_dice": 2 * iou / (1 + iou)}, abs=1e-12)
        assert overlap_metrics(cut(maps), cut(masks), threshold) == got
        assert overlap_metrics(maps[::-1], masks[::-1] * 7, threshold) == got
        if kind == "random":
            assert overlap_metrics(np.exp(maps.astype(float)), masks, np.exp(threshold)) == got


def test_overlap_of_thresholds_that_float32_rounds():
    maps = np.array([[[np.float32(0.1), 1.0]]], np.float32)  # 0.1 as float32 is above 0.1
    assert overlap_metrics(maps, np.array([[[1, 0]]]), 0.1)["pixel_iou"] == 0.5
    assert overlap_metrics(maps, np.array([[[1, 0]]]), float(np.float32(0.1)))["pixel_iou"] == 0
    for masks in (np.zeros((1, 1, 2)), np.ones((1, 1, 2))):
        assert overlap_metrics(maps, masks, 0.5) == {"pixel_iou": None, "pixel_dice": None}


LIMITS = {
    0.3: ("aupro_30", "AUPRO @0.3"), 0.05: ("aupro_05", "AUPRO @0.05"), 1: ("aupro_100", "AUPRO @1"),
    0.1: ("aupro_10", "AUPRO @0.1"), 0.01: ("aupro_01", "AUPRO @0.01"), 0.051: ("aupro_051", "AUPRO @0.051"),
    0.055: ("aupro_055", "AUPRO @0.055"), 0.001: ("aupro_001", "AUPRO @0.001"), 1e-5: ("aupro_00001", "AUPRO @0.00001"),
    0.999: ("aupro_999", "AUPRO @0.999"), 0.5: ("aupro_50", "AUPRO @0.5"),
}  # fmt: skip


def test_every_limit_of_aupro_has_a_key_of_its_own():
    for limit, (key, name) in LIMITS.items():
        assert (overlap_key("aupro", limit), name_of(key)) == (key, name)
    assert overlap_key("spro", 1.0) == overlap_key("spro", 1)
    thousandths = {overlap_key("aupro", i / 1000) for i in range(1, 1001)}
    assert len(thousandths) == 1000
    rng, masks, _ = images(2)
    got = pixel_metrics(draw("random", rng, masks), masks, tuple(LIMITS))
    assert list(got)[3:] == [key for key, _ in LIMITS.values()]


def test_names():
    assert [name_of(key) for key in ("image_f1max", "pixel_iou", "pixel_dice", "aupimo", "spro_x", "foo")] == [
        "image F1-max", "pixel IoU", "pixel Dice", "AUPIMO", "spro_x", "foo",
    ]  # fmt: skip


def test_tables_of_categories_and_notes():
    """Good images of one category are large enough for AUPIMO; the other one gets a note and no value."""
    rng = np.random.default_rng(6)
    maps = [rng.random((300, 400)) for _ in range(4)] + [rng.random((30, 40)) for _ in range(2)]
    masks = [np.zeros(amap.shape, bool) for amap in maps]
    for i in (3, 5):
        masks[i][:9, :9] = True
        maps[i][masks[i]] += 0.9
    outputs: dict[str, Any] = {
        "categories": np.array(["a"] * 4 + ["b"] * 2), "defects": np.array(["good"] * 3 + ["cut", "good", "cut"]),
        "labels": np.array([0, 0, 0, 1, 0, 1]), "scores": np.array([amap.max() for amap in maps]),
        "paths": np.array(list("012345")), "maps": maps, "masks": masks,
    }  # fmt: skip
    normal = {name: np.ones(2) for name in ("scores", "map_max", "map_median")}
    normal |= {"categories": np.array(["a", "b"]), "held_out": np.zeros(2, bool)}
    limits = thresholds(normal, 0.99)["per_category"]
    found, _, _, notes = measure_categories(outputs, {"a": True, "b": True}, [0.3], limits)
    expected = aupimo(maps[:4], masks[:4], np.array([0, 0, 0, 1]))
    assert expected is not None
    assert expected > 0.5
    assert (found["a"]["aupimo"], found["b"]["aupimo"]) == (expected, None)
    assert found["b"] | {"aupimo": 0} == found["b"] | {"aupimo": 0} | overlap_metrics(maps[4:], masks[4:], 1.0)
    (note,) = notes
    assert note == (
        "aupimo can't be computed: false positive rates from 1e-05 to 0.0001 need more than 333,333 pixels in good "
        "test images: b (1,200)"
    )
    mean, partial = mean_metrics(found)
    assert mean["aupimo"] == found["a"]["aupimo"]
    assert partial == ["some means are not over all 2 categories, but over those that have the metric: 1 for aupimo"]


def test_thresholds_from_held_out_images():
    """The larger quantile counts, of image scores and of maps' maxima apart; category b has no held-out image."""
    rng = np.random.default_rng(7)
    normal: dict[str, Any] = {name: rng.random(50) for name in ("scores", "map_max", "map_median")}
    normal |= {"categories": np.array(["a"] * 40 + ["b"] * 10), "held_out": np.arange(50) >= 30}
    normal["held_out"][40:] = False
    normal["scores"][30:40] += 1
    found = thresholds(normal, 0.9)
    expected = {
        "image": np.quantile(normal["scores"][30:40], 0.9),
        "pixel": max(np.quantile(normal["map_max"][:30], 0.9), np.quantile(normal["map_max"][30:40], 0.9)),
        "background": np.median(normal["map_median"][:40]), "images": 30, "held_out": 10,
    }  # fmt: skip
    assert found["per_category"]["a"] == pytest.approx(expected)
    normal["scores"][30:40] -= 2  # lower than those of training images
    expected["image"] = np.quantile(normal["scores"][:30], 0.9)
    assert thresholds(normal, 0.9)["per_category"]["a"] == pytest.approx(expected)
    assert found["per_category"]["b"]["image"] == pytest.approx(np.quantile(normal["scores"][40:], 0.9))
    assert (found["per_category"]["b"]["images"], found["per_category"]["b"]["held_out"]) == (10, 0)
    assert found["from"] == "normal training images or of held-out ones, whichever is larger"


def test_one_pass_measures_what_separate_calls_do():
    """Categories and kinds of defects, to the last bit; a kind without a defective pixel, and one kind alone."""
    rng = np.random.default_rng(8)
    masks = list(blobs(rng, 30, 40, 50, 0.1)) + list(blobs(rng, 5, 31, 20, 0.3))
    maps = [draw(("half tied", "random", "tied")[i % 3], rng, mask) for i, mask in enumerate(masks)]
    defects = np.array([("bent", "cut", "hole")[i % 4 % 3] if mask.any() else "good" for i, mask in enumerate(masks)])
    masks[4] = masks[4] * 0  # of a defective image
    defects[4] = "faint"
    defects[30:] = np.where(defects[30:] == "good", "good", "hole")
    labels = (defects != "good").astype(np.int64)
    scores = np.array([float(amap.max()) for amap in maps])
    outputs: dict[str, Any] = {
        "categories": np.array(["b"] * 30 + ["a"] * 5), "defects": defects, "labels": labels, "scores": scores,
        "paths": np.array([str(i) for i in range(35)]), "maps": maps, "masks": masks,
    }  # fmt: skip
    limits: Any = {"a": {"pixel": 1.0}, "b": {"pixel": 0.5}}
    found = measure_categories(outputs, {"a": True, "b": True}, [0.3, 0.05], limits)
    assert list(found.per_defect["b"]) == list(dict.fromkeys(defects[:30][labels[:30] == 1].tolist()))
    for category, kinds in found.per_defect.items():
        for kind, metrics in [("", found.per_category[category]), *kinds.items()]:
            rows = [
                i
                for i in range(35)
                if outputs["categories"][i] == category and (not kind or defects[i] in ("good", kind))
            ]
            pixels = [maps[i] for i in rows], [masks[i] for i in rows]
            expected = image_metrics(scores[rows], labels[rows]) | pixel_metrics(*pixels)
            expected |= {"aupimo": aupimo(*pixels, labels[rows])}
            expected |= overlap_metrics(*pixels, limits[category]["pixel"])
            assert metrics == ({"images": int((defects[rows] == kind).sum())} if kind else {}) | expected
            if not kind:
                for name, points in (image_curves(scores[rows], labels[rows]) | pixel_curves(*pixels)).items():
                    np.testing.assert_array_equal(found.curves[f"{category}/{name}"], points)
