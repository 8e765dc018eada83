"""Options in a configuration group checked against the type annotations of the constructor that receives them."""

import contextlib
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from anomalib_lite.errors import UserError

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a name",
    dict: "{key: value, ...}",
}


def check_types(group: str, target: Any, options: dict[str, Any]) -> None:
    """Raise UserError for an option whose type differs from the annotation in the constructor of the class `target`.

    Constructors of base classes are read too. Plain types, optional ones, and lists and dictionaries of them are
    checked; other annotations accept everything.
    """
    hints: dict[str, Any] = {}
    for cls in reversed(getattr(target, "__mro__", ())):
        with contextlib.suppress(Exception):  # annotations that can't be evaluated
            hints |= typing.get_type_hints(cls.__init__)
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{group}.{name}={json.dumps(value)}: give {_kind(hints[name])}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, types.NoneType) else True


def _kind(hint: Any) -> str:
    """The type in words: "a whole number, or null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_kind(each) for each in inner)
    if origin in (list, Sequence):
        return f"a list such as [{', '.join({int: ('3', '5'), float: ('0.5', '1')}.get(inner[0], ('a', 'b')))}]"
    return "null" if hint is types.NoneType else KINDS.get(origin or hint, str(hint))
