"""Checks of options that several methods have."""

from anomalib_lite.errors import UserError


def check_counts(**counts: int | None) -> None:
    """Raise UserError for the first option that is no whole number, or below 1; None is a value of its own."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UserError(f"method.{name}={count}: give a whole number from 1")


def check_from_0(**numbers: float) -> None:
    """Raise UserError for the first option that is negative."""
    for name, number in numbers.items():
        if number < 0:
            raise UserError(f"method.{name}={number}: give a number from 0")


def check_dropout(dropout: float) -> None:
    """Raise UserError for an option `dropout` that is no probability, or 1."""
    if not 0 <= dropout < 1:
        raise UserError(f"method.dropout={dropout}: give a share from 0, below 1")


def check_clip(clip: float | None) -> None:
    """Raise UserError for an option `clip` that is no norm of a gradient."""
    if clip is not None and clip <= 0:
        raise UserError(f"method.clip={clip}: give a norm above 0, or null")
