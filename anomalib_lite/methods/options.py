"""Checks of options that several methods have."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from anomalib_lite.errors import UserError


def configured_optimizer(method: Any, parameters: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer that `method.optimizer` makes for parameters; None for a method without training that has none.

    Raises:
        UserError: an option is not valid, or the method trains and nothing was configured.
    """
    make = method.optimizer
    if make is None:
        if not method.steps:
            return None
        raise UserError(
            f"method.optimizer: {type(method).__name__} would train without an optimizer, and its weights would stay "
            "as they are; configure one, as {_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3}, which the "
            "constructor hands on to AnomalyModule"
        )
    try:
        return make(parameters, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in getattr(make, "keywords", {}).items())
        raise UserError(f"method.optimizer: {error}; check its values ({given})") from error


def unused_by_variant(variants: Iterable[str], variant: str, optimizer: dict[str, Any]) -> dict[str, str]:
    """For `without_effect`: the other variants, and the options of the optimizer that the variant overrides.

    Args:
        variants: names of all variants. variant: the chosen one. optimizer: the options that it overrides.
    """
    unused = {f"variants.{name}": f"method.variant={variant}" for name in variants if name != variant}
    chosen = f"method.variants.{variant}.optimizer"
    return unused | {f"optimizer.{key}": f"{chosen}.{key}={str(value).lower()}" for key, value in optimizer.items()}


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


def check_drop(option: str, drop: dict[str, float] | None) -> None:
    """Raise UserError for a drop of the learning rate that is neither None nor {at: share of the budget, factor}."""
    known = isinstance(drop, Mapping) and drop.keys() == {"at", "factor"}
    if drop is not None and not (known and 0 < drop["at"] < 1 and drop["factor"] >= 0):
        raise UserError(
            f"{option}={drop}: give null, or {{at: A, factor: F}} with a share A of the budget, above 0 and below 1, "
            "and a number F from 0"
        )
