"""Statistics of a comparison, pure functions on arrays: seeds first, tests over categories, bootstrap over images."""

from collections.abc import Callable, Sequence

import numpy as np

Draws = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of resamples, labels, scores


def resamples(labels: np.ndarray, count: int = 1000, seed: int | Sequence[int] = 0) -> np.ndarray:
    """How often each image is drawn, [count, N] float64, with replacement, good and defective images separately: every
    resample has as many of both as the test set.
    """
    rng, drawn = np.random.default_rng(seed), np.zeros((count, len(labels)))
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if len(rows):
            picked = rng.integers(0, len(rows), (count, len(rows))) + len(rows) * np.arange(count)[:, None]
            drawn[:, rows] = np.bincount(picked.ravel(), minlength=count * len(rows)).reshape(count, len(rows))
    return drawn


def auroc_draws(drawn: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Image AUROC of every resample, [count], averaged over the seeds of `scores` [S, N].

    With the matrix of won comparisons (a tie is half), an AUROC is a bilinear form of the draws.
    """
    bad, good = scores[:, labels == 1], scores[:, labels == 0]
    won = np.zeros((bad.shape[1], good.shape[1]))
    for b, g in zip(bad, good, strict=True):
        won += np.sign(b[:, None] - g) / 2 + 0.5
    pairs = won.size * len(scores)
    return ((drawn[:, labels == 1] @ won) * drawn[:, labels == 0]).sum(1) / pairs


def _counts(drawn: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives of every resample at every distinct score, from the highest on, [count, G] each."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ordered, positive = drawn[:, order], labels[order] == 1
    return np.cumsum(ordered * positive, 1)[:, ends], np.cumsum(ordered * ~positive, 1)[:, ends]


def _averaged(metric: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Draws:
    """Draws of a metric of true and false positives, [count], averaged over the seeds of `scores` [S, N]."""
    return lambda drawn, labels, scores: np.mean([metric(*_counts(drawn, labels, one)) for one in scores], axis=0)


def _ap(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    """Step-wise, as in scikit-learn."""
    return (np.diff(tp, axis=1, prepend=0) * tp / np.maximum(tp + fp, 1)).sum(1) / tp[:, -1]


def _f1max(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    return (2 * tp / (tp + fp + tp[:, -1:])).max(1)


#: the metrics that follow from the images' scores
DRAWS: dict[str, Draws] = {"image_auroc": auroc_draws, "image_ap": _averaged(_ap), "image_f1max": _averaged(_f1max)}


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The bootstrap's 95 % percentile interval."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def wilcoxon(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p of Wilcoxon's signed-rank test of paired values; 1 where all pairs are equal.

    Equal pairs are dropped, ties share their mean rank, and the distribution is that of all 2^n signs of these ranks.
    SciPy 1.17 has no fast exact test with ties: method="exact" ignores them (0.49 where 0.45 is exact), "auto"
    approximates from 14 pairs on, and PermutationMethod gives this result in 12 s for 15 pairs, in place of 0.3 ms.
    """
    difference = np.round(np.subtract(a, b), 12)  # equal to within rounding is equal
    difference = difference[difference != 0]
    size, ordered = np.abs(difference), np.sort(np.abs(difference))
    ranks = np.searchsorted(ordered, size, "left") + np.searchsorted(ordered, size, "right") + 1  # doubled: whole
    chance = np.zeros(ranks.sum() + 1)
    chance[0] = 1
    for rank in ranks:
        chance[rank:] = (chance[rank:] + chance[:-rank]) / 2
        chance[:rank] /= 2
    seen = ranks[difference > 0].sum()
    return float(min(1, 2 * min(chance[: seen + 1].sum(), chance[seen:].sum())))


def holm(p: Sequence[float]) -> np.ndarray:
    """P values corrected for their number by Holm's step-down procedure, in the given order."""
    raw = np.asarray(p, np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(stepped, 1)
    return corrected
