"""The metrics against scikit-learn and a literal AUPRO; gathering over batches and ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import ndimage
from sklearn import metrics as sk

from anomalib_lite.metrics.functional import image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.gather import GatheredSamples
from tests.helpers.ranks import free_port, in_forks

IMAGE = ["image_auroc", "image_ap", "image_f1max"]
PIXEL = ["pixel_auroc", "pixel_ap", "pixel_f1max", "aupro_30", "aupro_05"]


def blobs(rng, n, h, w, share=0.2):
    masks = ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, 1.2, 1.2))
    masks = masks > np.quantile(masks, 1 - share)
    masks[::3] = False
    return masks


def draw(kind, rng, masks):
    noise = rng.standard_normal(masks.shape) + 0.8 * masks
    match kind:
        case "random":
            return noise.astype(np.float32)
        case "tied":
            return np.round(noise).astype(np.float32)
        case "two values":
            return (noise > 0.5).astype(np.float32)
        case "half tied":
            return np.where(rng.random(masks.shape) < 0.5, np.round(noise), noise).astype(np.float32)
        case "heavy tailed":
            return np.exp(np.clip(rng.standard_cauchy(masks.shape) + masks, -80, 80)).astype(np.float32)
        case "float64":
            return np.exp(np.clip(rng.standard_cauchy(masks.shape) + masks, -300, 300))
        case "float16":
            return noise.astype(np.float16)
        case "int":
            return np.round(3 * noise).astype(np.int32)
        case "uint8":
            return np.clip(np.round(20 * noise + 60), 0, 255).astype(np.uint8)
        case "bool":
            return noise > 0.3
    raise AssertionError(kind)


KINDS = ["random", "tied", "two values", "half tied", "heavy tailed", "float64", "float16", "int", "uint8", "bool"]


def pro_curve(maps, masks):
    """Literally: every distinct score is a threshold, every component is looked at."""
    maps = maps.astype(float)
    components = []
    for image, mask in enumerate(masks):
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        components += [maps[image][label == i] for i in range(1, count + 1)]
    normal = maps[masks == 0]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        fpr.append((normal >= threshold).mean())
        pro.append(np.mean([(component >= threshold).mean() for component in components]))
    return np.array(fpr), np.array(pro)


def slow_aupro(maps, masks, limit):
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(zip(*pro_curve(maps, masks), strict=True)):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


def slow_ranking(scores, labels):
    scores, labels = scores.ravel().astype(float), labels.ravel() != 0
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return [sk.roc_auc_score(labels, scores), sk.average_precision_score(labels, scores), f1.max()]


def close(got, expected):
    np.testing.assert_allclose(np.array([*got.values()], float), np.array(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_slow(kind, seed):
    rng = np.random.default_rng(seed)
    masks = blobs(rng, 5, 11 + seed, 17, share=(0.05, 0.2, 0.6)[seed])
    maps = draw(kind, rng, masks)
    limits = (0.3, 0.05, 0.123, 1.0)
    got = pixel_metrics(maps, masks, limits)
    assert list(got) == [*PIXEL, "aupro_123", "aupro_100"]
    expected = slow_ranking(maps, masks) + [slow_aupro(maps, masks, limit) for limit in limits]
    close(got, expected)
    got = image_metrics(maps.ravel(), masks.ravel())
    assert list(got) == IMAGE
    close(got, slow_ranking(maps, masks))


def test_larger_and_curves_lie_on_the_slow_ones():
    rng = np.random.default_rng(0)
    masks = blobs(rng, 4, 64, 64)
    maps = np.round(draw("random", rng, masks), 2)
    expected = slow_ranking(maps, masks) + [slow_aupro(maps, masks, limit) for limit in (0.3, 0.05)]
    close(pixel_metrics(maps, masks), expected)
    curves = pixel_curves(maps, masks)
    assert {c.dtype for c in curves.values()} == {np.dtype(np.float32)}
    assert all(len(c) <= 201 for c in curves.values())
    fpr, tpr, _ = sk.roc_curve(masks.ravel(), maps.ravel(), drop_intermediate=False)
    slow = {"pixel_tpr": (fpr, tpr), "pro": pro_curve(maps, masks)}
    for y, (xs, ys) in slow.items():
        x = curves["pixel_fpr" if y == "pixel_tpr" else "pro_fpr"]
        assert (x[0], curves[y][0], x[-1], curves[y][-1]) == (0, 0, 1, 1)
        gap = np.hypot(x[:, None] - xs, curves[y][:, None] - ys).min(axis=1)
        assert gap.max() < 1e-6
        assert np.abs(np.trapezoid(curves[y], x) - np.trapezoid(ys, xs)) < 1e-3
    precision, recall, _ = sk.precision_recall_curve(masks.ravel(), maps.ravel())
    points = np.stack((curves["pixel_precision"], curves["pixel_recall"]), axis=1)
    assert (points[0] == (1, 0)).all()
    assert points[-1, 1] == 1
    assert all(np.hypot(precision - p, recall - r).min() < 1e-6 for p, r in points)
    images = image_curves(maps.ravel(), masks.ravel())
    assert list(images) == ["image_fpr", "image_tpr", "image_precision", "image_recall"]
    np.testing.assert_array_equal(images["image_tpr"], curves["pixel_tpr"])


@pytest.mark.parametrize("kind", ["random", "tied", "half tied"])
def test_monotone_transforms_and_order_change_no_bit(kind):
    rng = np.random.default_rng(1)
    masks = blobs(rng, 7, 40, 40)
    maps = draw(kind, rng, masks)
    expected = pixel_metrics(maps, masks)
    rank = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    transformed = [
        maps.astype(np.float64),
        np.exp(maps.astype(np.float64)),
        maps * np.float32(-4) * np.float32(-0.25) * 8,
        np.cbrt(maps.astype(np.float64)) - 100,
        rank,
        (rank - rank.max() // 2).astype(np.float32),  # negatives, zero and positives
        (rank - rank.max() - 5).astype(np.float32),
    ]
    assert [pixel_metrics(x, masks) for x in transformed] == [expected] * len(transformed)
    for _ in range(5):
        order = rng.permutation(len(maps))
        assert pixel_metrics(maps[order], masks[order]) == expected
    assert pixel_metrics(maps[:, ::-1, :], masks[:, ::-1, :]) == expected
    assert pixel_metrics(maps.transpose(0, 2, 1), masks.transpose(0, 2, 1)) == expected
    assert pixel_metrics(maps, masks.astype(np.uint8) * 255) == expected
    labels, order = masks.ravel(), rng.permutation(maps.size)
    assert image_metrics(maps.ravel()[order], labels[order]) == image_metrics(maps.ravel(), labels)


def test_zeros_of_both_signs_are_tied():
    masks = np.array([[[1, 1, 0, 0, 1, 0]]])
    maps = np.array([[[0.0, -0.0, -0.0, 0.0, -0.0, -1.0]]], np.float32)
    assert pixel_metrics(maps, masks) == pixel_metrics(np.abs(maps) - 2 * (maps == -1), masks)
    assert pixel_metrics(maps, masks) == pixel_metrics(maps.astype(float), masks)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_many_positives(share):
    rng = np.random.default_rng(2)
    masks = rng.random((6, 300, 300)) < share
    maps = draw("half tied", rng, masks)
    got = pixel_metrics(maps, masks)
    close(dict(list(got.items())[:3]), slow_ranking(maps, masks))


def test_components_are_8_connected_and_weigh_the_same():
    masks = np.zeros((2, 6, 6), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 4:, 4:] = masks[1, :, 2] = True  # 2 (diagonal), 4 and 6 pixels
    maps = np.zeros((2, 6, 6))
    maps[0, 0, 0] = maps[0, 4:, 4:] = 1  # finds 1/2, 1 and 0: a mean of 0.5 at no false positive, then the diagonal
    assert pixel_metrics(maps, masks, (0.3,))["aupro_30"] == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_known_extremes():
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, 2:4, 2:4] = 7
    assert set(pixel_metrics(masks, masks).values()) == {1.0}
    worst = pixel_metrics(-1.0 * masks, masks)
    assert (worst["pixel_auroc"], worst["aupro_30"], worst["aupro_05"]) == (0, 0, 0)
    constant = pixel_metrics(np.ones((2, 8, 8)), masks)
    share = 4 / 128
    expected = [0.5, share, 2 * share / (1 + share), 0.15, 0.025]
    close(constant, expected)
    assert image_metrics(np.zeros(4), np.array([0, 0, 0, 1])) == {
        "image_auroc": 0.5, "image_ap": 0.25, "image_f1max": 0.4,
    }  # fmt: skip


def test_one_class_gives_none_and_an_empty_mask_no_component():
    maps = np.random.default_rng(0).random((3, 6, 6))
    for masks in (np.zeros((3, 6, 6)), np.ones((3, 6, 6))):
        assert pixel_metrics(maps, masks) == dict.fromkeys(PIXEL)
        curves = pixel_curves(maps, masks)
        assert len(curves) == 6
        assert all(len(c) == 0 for c in curves.values())
    for labels in (np.zeros(3), np.ones(3, bool)):
        assert image_metrics(maps[:, 0, 0], labels) == dict.fromkeys(IMAGE)
        assert all(len(c) == 0 for c in image_curves(maps[:, 0, 0], labels).values())
    masks = np.zeros((3, 6, 6), bool)
    masks[1, 2:5, 1:3] = True
    assert pixel_metrics(maps, masks)["aupro_30"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    one = pixel_metrics(maps[1:2], masks[1:2])  # a single image
    assert one["aupro_30"] == pytest.approx(slow_aupro(maps[1:2], masks[1:2], 0.3), abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_not_finite(bad, dtype):
    maps = np.ones((3, 4, 5), dtype)
    maps[1, 2, 3] = maps[2, 0, 0] = bad
    with pytest.raises(ValueError, match=r"2 of 60 maps are NaN or infinite, the first at index \(1, 2, 3\)"):
        pixel_metrics(maps, np.zeros(maps.shape))
    with pytest.raises(ValueError, match=r"2 of 60 scores are NaN or infinite, the first at index \(33,\)"):
        image_metrics(maps.ravel(), np.zeros(maps.size))


def test_bad_arguments():
    for call, match in [
        (lambda: image_metrics(np.ones(3), np.ones(4)), r"both be \[N\], got \(3,\) and \(4,\)"),
        (lambda: image_metrics(np.ones((3, 1)), np.ones((3, 1))), r"both be \[N\]"),
        (lambda: image_metrics(np.ones(0), np.ones(0)), "empty"),
        (lambda: image_metrics(np.ones(3), np.array([0, 1, 2])), r"labels must be 0 or 1, got \[2\]"),
        (lambda: image_metrics(np.ones(3), np.array([0, 1, np.nan])), "labels must be 0 or 1"),
        (lambda: image_metrics(np.ones(3, complex), np.zeros(3)), "real"),
        (lambda: pixel_metrics(np.ones((2, 4, 4)), np.ones((2, 4, 5))), r"both be \[N, H, W\]"),
        (lambda: pixel_metrics(np.ones((4, 4)), np.ones((4, 4))), r"both be \[N, H, W\]"),
        (lambda: pixel_metrics(np.ones((0, 4, 4)), np.ones((0, 4, 4))), "empty"),
        (lambda: pixel_metrics(np.ones((1, 4, 4)), np.ones((1, 4, 4)), (0.3, 0.0)), "fpr_limits"),
        (lambda: pixel_metrics(np.ones((1, 4, 4)), np.ones((1, 4, 4)), (1.5,)), "fpr_limits"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def cut(images, at=9):
    """Every image [H, W] as two of different widths."""
    return [part for image in images for part in (image[:, :at], image[:, at:])]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_maps_of_different_sizes(dtype):
    """No component lies across the cut, so cutting the images in two changes no bit."""
    rng = np.random.default_rng(3)
    masks = blobs(rng, 7, 24, 20)
    masks[:, :, 8:10] = False
    maps = draw("half tied", rng, masks).astype(dtype)
    for whole, parts in (((maps, masks), (cut(maps), cut(masks))), ((maps, masks), (list(maps), list(masks)))):
        assert pixel_metrics(parts[0], parts[1], (0.3, 0.1)) == pixel_metrics(whole[0], whole[1], (0.3, 0.1))
        for (name, expected), points in zip(pixel_curves(*whole).items(), pixel_curves(*parts).values(), strict=True):
            np.testing.assert_array_equal(points, expected, err_msg=name)
    with pytest.raises(ValueError, match=r"map 1 and mask 1 must both be \[H, W\], got \(24, 11\) and \(24, 9\)"):
        pixel_metrics(cut(maps), [masks[0, :, :9]] * 14)
    with pytest.raises(ValueError, match="shorter"):
        pixel_metrics(cut(maps), cut(masks)[:-1])
    with pytest.raises(ValueError, match=r"1 of 5 map 1 are NaN or infinite, the first at index \(0, 4\)"):
        pixel_metrics([np.ones((2, 3)), np.array([[1, 2, 3, 4, np.nan]])], [np.ones((2, 3)), np.ones((1, 5))])
    with pytest.raises(ValueError, match="both be"):
        pixel_metrics([], [])


# --- gathering ---

COUNT = 11
COLUMNS = ("scores", "labels", "maps", "masks")


def dataset(ragged):
    """The columns of COUNT images; if `ragged`, of different widths."""
    rng = np.random.default_rng(7)
    masks = blobs(rng, COUNT, 24, 20)
    maps = draw("half tied", rng, masks)
    scores, labels = maps.max(axis=(1, 2)).astype(float), masks.any(axis=(1, 2)).astype(np.int64)
    widths = [5 + i if ragged else 20 for i in range(COUNT)]
    cut_images = ([x[:, :width] for x, width in zip(images, widths, strict=True)] for images in (maps, masks))
    return dict(zip(COLUMNS, (scores, labels, *cut_images), strict=True))


def collect(positions, size, ragged=False):
    """The samples at `positions`, in batches of `size`."""
    columns, collected = dataset(ragged), GatheredSamples(*COLUMNS)
    for index in torch.tensor(positions).split(size) if positions else ():
        batch = {name: [torch.as_tensor(values[i]) for i in index] for name, values in columns.items()}
        collected.update(index, **(batch if ragged else {k: torch.stack(v) for k, v in batch.items()}))
    return collected


def check_gathered(collected, ragged=False):
    """Rank 0 has every image once, in order, bit by bit; so its metrics are those of one device."""
    gathered, expected = collected.gather(), dataset(ragged)
    if dist.is_initialized() and dist.get_rank():
        assert gathered is None
        return
    assert list(gathered) == list(expected)
    for name, values in expected.items():
        assert len(gathered[name]) == COUNT
        for found, value in zip(gathered[name], values, strict=True):
            np.testing.assert_array_equal(found, value)
            assert found.dtype == value.dtype
    assert pixel_metrics(gathered["maps"], gathered["masks"]) == pixel_metrics(expected["maps"], expected["masks"])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batch_sizes_order_and_duplicates(size, ragged):
    positions = [*np.random.default_rng(size).permutation(COUNT).tolist(), 3, 0, 3]
    check_gathered(collect(positions, size, ragged), ragged)


def test_no_samples():
    collected = GatheredSamples(*COLUMNS)
    empty = {name: torch.zeros(0, 4, 4) if name in ("maps", "masks") else torch.zeros(0) for name in COLUMNS}
    collected.update(torch.tensor([], dtype=torch.int64), **empty)
    gathered = collected.gather()
    assert gathered is not None
    assert {name: len(values) for name, values in gathered.items()} == dict.fromkeys(COLUMNS, 0)
    assert (gathered["scores"].dtype, gathered["labels"].dtype) == (np.float64, np.int64)


def test_batches_are_copied_converted_and_checked():
    collected = GatheredSamples("maps", "masks", "labels")
    maps, masks, labels = torch.rand(2, 4, 4), torch.eye(4).expand(2, 4, 4), torch.tensor([True, False])
    expected, index = maps.clone(), torch.tensor([5, 2])
    collected.update(index, maps=maps, masks=masks, labels=labels)
    maps.zero_()
    index.zero_()
    gathered = collected.gather()
    assert gathered is not None
    np.testing.assert_array_equal(np.stack(gathered["maps"]), expected.flip(0))
    np.testing.assert_array_equal(gathered["masks"][0], np.eye(4, dtype=bool))
    assert gathered["labels"].tolist() == [0, 1]
    good = {"maps": torch.rand(2, 4, 4), "masks": torch.rand(2, 4, 4), "labels": labels}
    for name, bad in (
        ("masks", masks[:1]), ("labels", torch.tensor([1])), ("labels", labels[:, None]),
        ("maps", torch.rand(2, 1, 4, 4)), ("maps", torch.rand(2, 4)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} of 2 images must be"):
            collected.update(torch.tensor([0, 1]), **good | {name: bad})


def rank_main(rank, worlds):
    torch.set_num_threads(1)
    for port, cases in worlds:
        if rank < len(cases[0]):
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(cases[0]))
            for shares in cases:
                for ragged in (False, True):
                    collected = collect(shares[rank], rank + 2, ragged)
                    check_gathered(collected, ragged)
                    check_gathered(collected, ragged)  # gathering does not change what was collected
            dist.barrier()
            dist.destroy_process_group()


def test_one_two_and_three_ranks():
    """Also ranks without a sample, and samples that several ranks have."""
    a, b = [5, 3, 6, 7, 4], [4, 1, 8, 0, 10, 9, 2, 2]
    one, two = [[a + b]], [[[], a + b], [[10, 9, 1], [0, 2, 3, 4, 5, 6, 7, 8, 9]]]
    three = [[[], a, b], [a, [], b], [a, b, b]]
    worlds = [(free_port(), cases) for cases in (three, two, one)]
    in_forks(3, rank_main, worlds)
