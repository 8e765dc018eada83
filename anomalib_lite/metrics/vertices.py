"""Exact counts of positives and negatives at every distinct score, of which all curves and their metrics are made.

Algorithm: the curves bend only at the scores of positives, which are few. The negatives are sorted by value, chunk by
chunk (NumPy >= 2 does that with SIMD, but not an argsort), and binary searches count those above each distinct positive
score. The counts of chunks add up to the same integers whatever the chunks are, so memory does not grow with the number
of negatives.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anomalib_lite.data.cores import threads

Array = NDArray[Any]
Images = Array | Sequence[Array]  # of one shape [N, H, W], or a sequence of 2-D arrays
Positives = tuple[Array, Array]  # scores [P], and the areas of their components in pixels [P]

_SORTED = 1 << 25  # negatives that all threads together hold sorted at a time
_LOOKED_UP = 1 << 20  # thresholds that are looked up together; limits the size of temporaries


class Vertices(NamedTuple):
    """Counts at each distinct score of a positive, from the highest to the lowest score, all [V].

    Between two of them only negatives pass the threshold, so the curves run horizontally from (`fp`, value) to the next
    (`fp_before`, value); from there to the next (`fp`, next value) positives and negatives are tied: a straight line.
    """

    tp: Array  # int64, positives with a score >= the threshold; the last is the number of positives
    fp: Array  # int64, negatives with a score >= the threshold
    fp_before: Array  # int64, negatives with a score > the threshold
    pro: Array  # float64, mean share of each component with a score >= the threshold; the last is 1
    negatives: int


class Pixels:
    """Maps and masks image by image, each checked when it is read: they may lie in a file.

    Args:
        maps: [N, H, W], higher is more anomalous, any real dtype (float16 counts as float32); or a sequence of N maps
            [H_i, W_i].
        masks: as the maps; any nonzero pixel is anomalous.
        rows: positions of the images that are meant; None: all.

    Raises:
        ValueError: maps that are not finite, shapes that do not fit, no pixel at all; of a sequence when it is read.
    """

    def __init__(self, maps: Images, masks: Images, rows: Sequence[int] | Array | None = None):
        self.whole = isinstance(maps, np.ndarray) or not len(maps)
        if self.whole:
            maps, masks = checked("maps", np.asarray(maps), "masks", np.asarray(masks), "[N, H, W]")
        elif len(maps) != len(masks):
            name, count = ("masks", len(masks)) if len(masks) < len(maps) else ("maps", len(maps))
            raise ValueError(f"the {name} are shorter than their counterpart: {count} images")
        self.maps, self.masks = maps, masks
        self.rows = range(len(maps)) if rows is None else rows
        dtypes = {maps.dtype} if hasattr(maps, "dtype") else {amap.dtype for amap in map(np.asarray, maps)}
        self.dtype = np.result_type(np.float32, *dtypes)

    def __len__(self) -> int:
        return len(self.rows)

    def mask(self, i: int) -> Array:
        return np.asarray(self.masks[self.rows[i]])

    def __getitem__(self, i: int) -> tuple[Array, Array]:
        """The map and the mask of an image, [H, W] each."""
        pair = self.maps[self.rows[i]], self.mask(i)
        return pair if self.whole else checked(f"map {i}", pair[0], f"mask {i}", pair[1], "[H, W]")

    def each(self) -> Iterator[tuple[Array, Array]]:
        return (self[i] for i in range(len(self)))


def image_vertices(scores: Array, labels: Array) -> Vertices | None:
    """From one score and label (0 or 1) per image, [N] each; None where only one class is present."""
    scores, labels = checked("scores", scores, "labels", labels, "[N]")
    anomalous = labels == 1
    if not (anomalous | (labels == 0)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels[~anomalous & (labels != 0)])[:5]}")
    scores = scores.astype(np.result_type(scores.dtype, np.float32))
    positives = np.sort(scores[anomalous])[::-1]
    return curve_vertices([np.sort(scores[~anomalous])], positives, np.ones(len(positives)))


def curve_vertices(negatives: Iterable[Array], scores: Array, shares: Array) -> Vertices | None:
    """The curve's vertices; None where only one class is present.

    Args:
        negatives: their scores in parts, each of them rising.
        scores: of the positives, falling [P]. shares: the part of its component that each positive is, float64 [P].
    """
    steps, number = _Steps(scores, shares), 0
    counts = _Counts(steps.keys, 2**32)
    for part in negatives:
        counts.add(part)
        number += len(part)
    return steps.vertices(counts.above, number)


def pixel_vertices(pixels: Pixels, groups: Sequence[Sequence[int] | Array] | None = None) -> Iterator[Vertices | None]:
    """Vertices over all pixels of `groups[0]` (good images) and each further group (a kind of defect), in this order,
    and at last over all groups together; None where only one class is present. They are made when they are asked for.

    Every negative is sorted once, and every positive at most twice, however many kinds there are.

    Args:
        groups: disjoint positions of images; None: all images as the only group.
    """
    groups = [range(len(pixels))] if groups is None else groups
    workers = min(8, threads())
    with ThreadPoolExecutor(workers) as pool:
        found = [list(pool.map(partial(_positives, pixels), np.array_split(rows, workers))) for rows in groups]
        positives = [_joined([part[:2] for part in parts], pixels.dtype) for parts in found]
        normal = [np.concatenate([part[2] for part in parts]) for parts in found]
        negatives = [int(counts.sum()) for counts in normal]
        whole = _falling_steps(*_joined(positives, pixels.dtype))
        kinds = [
            _falling_steps(*_joined([positives[0], each], pixels.dtype)) for each in positives[1:] if len(groups) > 2
        ]
        del positives, found
        counts, good = _Counts(whole.keys, sum(negatives)), list[Array]()
        places = [np.searchsorted(whole.keys, kind.keys) for kind in kinds]
        limit = max(1, min(_SORTED, sum(negatives)) // workers)
        for number, rows in enumerate(groups):
            before = counts.above[:, places[number - 1]] if number and kinds else None
            for _ in pool.map(lambda part: counts.add(_negatives(pixels, *part)), _parts(rows, normal[number], limit)):
                pass
            if number == 0:
                good = [counts.above[:, place] for place in places]
            elif before is not None:
                of_kind = good[number - 1] + (counts.above[:, places[number - 1]] - before)
                yield kinds[number - 1].vertices(of_kind, negatives[0] + negatives[number])
        every = whole.vertices(counts.above, sum(negatives))
    if len(groups) == 2:  # the only kind is the whole
        yield every
    yield every


def _positives(pixels: Pixels, rows: Sequence[int] | Array) -> tuple[Array, Array, Array]:
    """Of each positive its score and the area of its component in pixels; of each image the number of negatives."""
    scores, areas = [np.empty(0, pixels.dtype)], [np.empty(0, np.int32)]
    negatives = np.empty(len(rows), np.int64)
    for place, i in enumerate(rows):
        mask = pixels.mask(i)
        negatives[place] = mask.size - np.count_nonzero(mask)
        if negatives[place] < mask.size:
            amap, mask = pixels[i]
            defect = np.not_equal(mask, 0, order="C")
            _, label, stats, _ = cv2.connectedComponentsWithStats(defect.view(np.uint8), connectivity=8)
            scores.append(amap[defect].astype(pixels.dtype, copy=False))
            areas.append(stats[:, cv2.CC_STAT_AREA][label[defect]])
    return np.concatenate(scores), np.concatenate(areas), negatives


def _joined(positives: Sequence[Positives], dtype: Any) -> Positives:
    scores, areas = zip(*positives, strict=True)
    return np.concatenate(scores).astype(dtype, copy=False), np.concatenate(areas)


def _parts(rows: Sequence[int] | Array, counts: Array, limit: int) -> list[tuple[Array, Array]]:
    """Consecutive images with about `limit` negatives together, and the images' numbers of negatives."""
    rows, after = np.asarray(rows, int), np.cumsum(counts)
    cuts = np.flatnonzero(np.diff(after // limit)) + 1
    return list(zip(np.split(rows, cuts), np.split(counts, cuts), strict=True)) if len(rows) else []


def _negatives(pixels: Pixels, rows: Array, counts: Array) -> Array:
    """The scores of the negatives of some images, rising."""
    negatives, end = np.empty(counts.sum(), pixels.dtype), 0
    for i, count in zip(rows, counts, strict=True):
        amap, mask = pixels[i]
        negatives[end : end + count] = amap.ravel() if count == amap.size else amap[np.equal(mask, 0, order="C")]
        end += count
    negatives.sort()
    return negatives


class _Steps:
    """The distinct scores of positives: `keys` rising [V]; `tp` and `pro` as in Vertices.

    Args:
        scores: falling [P]. shares: the part of its component that each positive is, float64 [P].
    """

    def __init__(self, scores: Array, shares: Array):
        last = np.flatnonzero(
            np.append(scores[1:] != scores[:-1], True)[: len(scores)]
        )  # of each group of tied positives
        found = np.cumsum(shares)
        self.pro = found[last] / found[-1:]  # the shares add up to the number of components
        self.keys = scores[last][::-1].copy()  # rising keys make searchsorted's next search start at the last find
        self.tp = last + 1

    def vertices(self, above: Array, negatives: int) -> Vertices | None:
        """From the counts of `_Counts` at the keys."""
        if not (len(self.tp) and negatives):
            return None
        fp, before = above[:, ::-1].astype(np.int64)
        return Vertices(self.tp, fp, before, self.pro, negatives)


class _Counts:
    """How many negatives have a score >= (`above[0]`) and > (`above[1]`) each key, [2, V], for rising keys [V]."""

    def __init__(self, keys: Array, most: int):
        self.keys, self.lock = keys, Lock()
        self.above = np.zeros((2, len(keys)), np.uint32 if most < 2**32 else np.int64)

    def add(self, negatives: Array) -> None:
        """Count further negatives, rising."""
        for start in range(0, len(self.keys) if len(negatives) else 0, _LOOKED_UP):
            chunk = slice(start, start + _LOOKED_UP)
            keys = self.keys[chunk]
            below = np.searchsorted(negatives, keys, "left")
            upto = below.copy()
            tied = negatives[np.minimum(below, len(negatives) - 1)] == keys  # else both sides are the same place
            upto[tied] = np.searchsorted(negatives, keys[tied], "right")
            found = len(negatives) - np.stack((below, upto))
            with self.lock:
                self.above[:, chunk] += found.astype(self.above.dtype)


def _falling_steps(scores: Array, areas: Array) -> _Steps:
    """From positives, by falling score and, where tied, by rising area: their order in the input changes nothing."""
    if scores.dtype != np.float32:
        order = np.lexsort((areas, -scores))
        return _Steps(scores[order], np.reciprocal(areas[order], dtype=float))
    # both in one integer, which NumPy sorts several times faster than pairs
    key = _flip((scores + np.float32(0)).view(np.uint32)).astype(np.uint64)  # + 0 turns -0 into 0
    key <<= np.uint64(32)
    key |= areas.astype(np.uint32)
    key.sort()
    falling = _flip((key >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return _Steps(falling, np.reciprocal(key.astype(np.uint32), dtype=float))


def _flip(bits: Array) -> Array:
    """From a float32's bits to an integer that falls as the float rises, and back."""
    return np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))


def checked(name: str, values: Array, labels_name: str, labels: Array, shape: str) -> tuple[Array, Array]:
    values, labels = np.asarray(values), np.asarray(labels)
    if values.shape != labels.shape or values.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} and {labels_name} must both be {shape}, got {values.shape} and {labels.shape}")
    if values.size == 0:
        raise ValueError(f"{name} are empty: shape {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, got {values.dtype}")
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):  # without a temporary as large as the input
        bad = ~np.isfinite(values)
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        raise ValueError(f"{bad.sum()} of {bad.size} {name} are NaN or infinite, the first at index {first}")
    return values, labels
