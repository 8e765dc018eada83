"""A score beside its threshold, as tables and pictures show it. Imports nothing heavy."""


def ratio(score: float, threshold: float) -> float | None:
    """The score over the threshold; None at thresholds of 0 and below, of which a multiple says nothing."""
    return score / threshold if threshold > 0 else None


def score_text(score: float, threshold: float) -> str:
    """The score as a multiple of its threshold; both where the threshold is not above 0."""
    times = ratio(score, threshold)
    return f"{score:.3g} (threshold {threshold:.3g})" if times is None else f"{times:.2f} x threshold"
