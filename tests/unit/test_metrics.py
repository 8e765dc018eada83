"""The metrics against scikit-learn and a literal AUPRO, and their torchmetrics states over batches and ranks."""

import socket
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import ndimage
from sklearn import metrics as sk

from anomalib_lite.metrics.functional import image_curves, image_metrics, pixel_curves, pixel_metrics
from anomalib_lite.metrics.gather import ImageMetrics, PixelMetrics

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
    assert list(got) == [*PIXEL, "aupro_12", "aupro_100"]
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


# States


def dataset(n=11):
    rng = np.random.default_rng(7)
    masks = blobs(rng, n, 24, 20)
    maps = draw("half tied", rng, masks)
    return maps, masks, maps.max(axis=(1, 2)), masks.any(axis=(1, 2)).astype(np.int64)


def fill(positions, size):
    """Both metrics, updated with the samples at `positions` in batches of `size`."""
    arrays = [torch.from_numpy(a) for a in dataset()]
    pixel, image = PixelMetrics(), ImageMetrics()
    for i in torch.tensor(positions, dtype=torch.int64).split(size):
        maps, masks, scores, labels = (a[i] for a in arrays)
        pixel.update(maps, masks, i)
        image.update(scores, labels, i)
    return pixel, image


def check_ragged(positions):
    """Parts of the images at `positions`, cut where their number says, come back in order, from all ranks."""
    whole_maps, whole_masks, *_ = dataset()
    maps, masks = ([x[:, : 5 + i] for i, x in enumerate(whole)] for whole in (whole_maps, whole_masks))
    pixel = PixelMetrics((0.3,), ragged=True)
    for batch in torch.tensor(positions, dtype=torch.int64).split(3):
        some = [torch.from_numpy(maps[i]) for i in batch], [torch.from_numpy(masks[i]) for i in batch]
        pixel.update(some[0], some[1], batch)
    assert pixel.compute() == pixel_metrics(maps, masks, (0.3,))
    gathered = pixel.gathered()
    if gathered is not None:
        assert gathered["index"].tolist() == list(range(len(maps)))
        for name, arrays in (("maps", maps), ("masks", masks)):
            for found, array in zip(gathered[name], arrays, strict=True):
                np.testing.assert_array_equal(found, array)
                assert found.dtype == array.dtype


def test_samples_of_different_sizes():
    check_ragged([*np.random.default_rng(0).permutation(11).tolist(), 3, 0, 3])
    empty = PixelMetrics(ragged=True).gathered() or {}
    assert (empty["maps"], empty["masks"], empty["index"].tolist()) == ([], [], [])


def check(pixel, image):
    maps, masks, scores, labels = dataset()
    assert pixel.compute() == pixel_metrics(maps, masks)
    assert image.compute() == image_metrics(scores, labels)
    both = (image.gathered() or {}) | (pixel.gathered() or {})
    if dist.is_initialized() and dist.get_rank():
        assert both == {}
        return
    expected = {"scores": scores, "labels": labels, "index": np.arange(len(maps)), "maps": maps, "masks": masks}
    assert list(both) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(both[name], array)
    assert (both["maps"].dtype, both["masks"].dtype) == (np.float32, bool)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("size", range(1, 8))
def test_batch_sizes_order_and_duplicates(size):
    positions = [*np.random.default_rng(size).permutation(11).tolist(), 3, 0, 3]
    pixel, image = fill(positions, size)
    check(pixel, image)
    pixel.to("meta")  # as Lightning moves metrics: the states stay where they are
    assert {x.device.type for x in pixel.maps + pixel.masks + pixel.index} == {"cpu"}
    pixel.reset()
    image.reset()
    assert pixel.gathered()["maps"].shape == (0, 0, 0)
    for metric in (pixel, image):
        with pytest.raises(ValueError, match="empty"):
            metric.compute()


def test_states_copy_convert_and_check():
    pixel, image = PixelMetrics((0.1,)), ImageMetrics()
    maps, masks = torch.rand(2, 4, 4, dtype=torch.float64), torch.eye(4).expand(2, 4, 4)
    pixel(maps, masks, torch.tensor([5, 2]))  # forward only updates
    expected = pixel_metrics(maps.float().numpy(), masks.numpy(), (0.1,))
    assert pixel.compute() == expected
    assert "aupro_10" in expected
    pixel.reset()
    maps, index = maps.float(), torch.tensor([5, 2])  # held in these types: nothing to convert
    pixel.update(maps, masks, index)
    maps.zero_()
    index.zero_()
    assert pixel.compute() == expected
    for bad in (
        (torch.rand(2, 4, 4), masks[:1], torch.tensor([0, 1])),
        (torch.rand(2, 4, 4), masks, torch.tensor([0])),
        (torch.rand(2, 4, 5), torch.rand(2, 4, 5), torch.tensor([0, 1])),  # not as the batch before
        (torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), torch.tensor([0, 1])),
    ):
        with pytest.raises(ValueError, match="shapes"):
            pixel.update(*bad)
    with pytest.raises(ValueError, match="integers or bool"):
        image.update(torch.rand(2), torch.rand(2), torch.tensor([0, 1]))
    image.update(torch.rand(2), torch.tensor([0, 2]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        image.compute()


def rank_main(rank, worlds):
    torch.set_num_threads(1)
    for port, cases in worlds:
        if rank < len(cases[0]):
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(cases[0]))
            run_cases(rank, cases)
            dist.barrier()
            dist.destroy_process_group()


def run_cases(rank, cases):
    for shares in cases:
        pixel, image = fill(shares[rank], rank + 2)
        check(pixel, image)
        check(pixel, image)  # computing does not disturb the states
        check_ragged(shares[rank])
    # one rank's bad value is an error on every rank, and nobody waits for ever
    if rank == 1:
        image.update(torch.tensor([np.nan]), torch.tensor([1]), torch.tensor([99]))
    with pytest.raises(ValueError, match="1 of 12 scores are NaN"):
        image.compute()
    pixel.reset()
    pixel.update(torch.rand(1, 3, 3 + rank), torch.rand(1, 3, 3 + rank), torch.tensor([rank]))
    with pytest.raises(ValueError, match="ranks hold samples of different shapes"):
        pixel.compute()
    image.reset()
    with pytest.raises(ValueError, match="empty"):
        image.compute()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_one_rank():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        check(*fill([*range(11)], 4))
    finally:
        dist.destroy_process_group()


def test_two_and_three_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    a, b = [5, 3, 6, 7, 4], [4, 1, 8, 0, 10, 9, 2, 2]
    two = [[[], a + b], [[10, 9, 1], [0, 2, 3, 4, 5, 6, 7, 8, 9]]]
    three = [[[], a, b], [a, [], b], [a, b, b]]
    torch.multiprocessing.spawn(rank_main, ([(free_port(), three), (free_port(), two)],), nprocs=3)
