"""Types and ranges of the configuration's values, and how an error names them."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from anomalib_lite.cli.keys import each_value, encodable, lookup
from anomalib_lite.errors import UserError


@dataclass(frozen=True)
class Key:
    """Metadata of a key.

    Attributes:
        give: the end of the error for an invalid value: "KEY=VALUE: give …".
        free: where the key may change: "resume" (between a run and its continuation), "evaluate" (when a stored run is
            evaluated again), "compare" (between runs of the same experiment), "moved" (a path that may change on
            resume and evaluation if it leads to the same content).
    """

    give: str = "its options by their names"
    free: tuple[str, ...] = ()


ALWAYS = ("resume", "evaluate", "compare")


def require(test: Callable[[Any], Any]) -> AfterValidator:
    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError
        return value

    return AfterValidator(check)


def refuse(kind: type) -> Callable[[Any], Any]:
    """Refuses values of a type that pydantic would convert: bool, or int, which includes bool."""

    def check(value: Any) -> Any:
        if isinstance(value, kind):
            raise ValueError
        return value

    return check


Whole = Annotated[int, Field(ge=1)]
WholeFrom0 = Annotated[int, Field(ge=0)]
NumberFrom0 = Annotated[float, Field(ge=0), BeforeValidator(refuse(bool))]
Positive = Annotated[float, Field(gt=0), BeforeValidator(refuse(bool))]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(refuse(bool))]
Ends = Annotated[list[float], require(lambda ends: len(ends) == 2 and ends[0] < ends[1])]
Odd = Annotated[Whole, require(lambda number: number % 2 == 1)]
Names = str | Annotated[list[str], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Side = Annotated[int, Field(ge=16)]
Size = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
Auto = Literal["auto"]
Mode = Literal["auto", "online", "offline", "disabled"]  # of W&B
Project = Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]*$")]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
FLAG, WHOLE, WHOLE_OR_NULL = "true or false", "a whole number from 1", "a whole number from 1, or null"
SIZE, GIGABYTES, SHARE = "a whole number from 16, or [height, width]", "gigabytes from 0", "a share above 0, at most 1"
NAME, SECONDS = "text, or null", "seconds above 0"
SMOOTH = "a sigma above 0, {sigma: 4, size: 5}, {box: 11, times: 3} (odd sizes)"


class Group(BaseModel, strict=True, extra="ignore", allow_inf_nan=False):
    """A group of the configuration; keys that it doesn't name belong to classes of the package or the user."""


Decays = Annotated[list[Annotated[NumberFrom0, Field(lt=1)]], Field(min_length=1)]
NUMBER = "a number from 0"


class Optimizer(Group):
    """The numbers that PyTorch's optimizers share, wherever the `method` group has an optimizer."""

    lr: Annotated[NumberFrom0 | None, Key(NUMBER)] = None
    momentum: Annotated[NumberFrom0 | None, Key(NUMBER)] = None
    weight_decay: Annotated[NumberFrom0 | None, Key(NUMBER)] = None
    betas: Annotated[Decays | None, Key("a list of shares from 0, below 1, such as [0.9,0.999]")] = None
    eps: Annotated[NumberFrom0 | list[NumberFrom0] | None, Key(NUMBER)] = None


class Smoothing(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """A filter of anomaly maps, with exactly these options."""


class Gauss(Smoothing):
    sigma: Positive
    size: Odd | None = None
    pad: Literal["mirror", "zeros"] | None = None


class Box(Smoothing):
    box: Odd
    times: Whole | None = None


class Pool(Smoothing):
    pool: Whole


Smooth = Positive | Gauss | Box


class Tiles(BaseModel, strict=True, extra="forbid"):
    """The options of data.tiling."""

    size: Size
    overlap: WholeFrom0 = 0
    image_size: Size | Literal["original"] = "original"

    @model_validator(mode="after")
    def _fits(self) -> "Tiles":
        if self.overlap >= (self.size if isinstance(self.size, int) else min(self.size)):
            raise ValueError
        return self


TilingKey = Annotated[
    Tiles | None,
    Key("{size: 512, overlap: 64}: sides from 16, an overlap from 0 below them; with image_size: SIZE or not; or null"),
]


def check_group(values: dict[str, Any], model: type[Group], prefix: str = "") -> None:
    """Raise UserError for the first invalid value of a group: "KEY=VALUE: give …"."""
    try:
        model.model_validate(each_value(values, encodable))
    except ValidationError as error:
        place = error.errors(include_url=False, include_context=False)[0]["loc"]
        raise UserError(_message(values, model, place, prefix)) from None


def _message(values: Any, model: type[Group], place: tuple[int | str, ...], prefix: str) -> str:
    """`place`: the path to the invalid value as pydantic gives it, with parts of the type at its end."""
    fields = fields_of(model)
    keys = (".".join(map(str, place[:end])) for end in range(len(place), 0, -1))
    key = next(key for key in keys if key in fields)
    value = lookup(values, key)
    shown = json.dumps(value) if value is None or isinstance(value, bool) else value
    return f"{prefix}.{key}".strip(".") + f"={shown}: give {metadata(fields[key]).give}"


@functools.cache
def fields_of(model: type[Group], prefix: str = "") -> dict[str, Any]:
    """{key: field} of all keys and groups below a group, each group before what it holds."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[f"{prefix}{name}"] = field
        if group := group_of(field):
            found |= fields_of(group, f"{prefix}{name}.")
    return found


def metadata(field: Any) -> Key:
    return next((each for each in field.metadata if isinstance(each, Key)), Key())


def group_of(field: Any) -> Any:
    """The model of a group, also of an optional one; None for a value."""
    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Group)), None)
