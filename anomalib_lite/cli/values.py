"""Values on the command line. Paths and names stay as typed, even if they look like numbers, booleans or lists."""

import re
from typing import Any

#: a part of a value: quoted text, or what stands between quotes, brackets and commas
PART = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\[\](),'"]+""")


def read(override: str) -> Any:
    """The value of KEY=VALUE in Hydra's grammar: a plain value, or one of Hydra's sweeps. Raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides([override])[0].value()


def as_typed(override: str) -> str:
    """The override, with quotes around a path or name that Hydra would read as something else than text.

    data.root=2024 becomes data.root="2024", and data.category=[a,1e3] becomes data.category=[a,"1e3"]. null stays null
    if it is a value of the key.
    """
    from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString, Sweep
    from hydra.errors import HydraException

    def quote(text: str) -> str:
        return QuotedString(text, Quote.double).with_quotes()

    def parsed(override: str) -> Any:
        """Ellipsis for what Hydra can't read, such as an open bracket or letters that are not ASCII."""
        try:
            return read(override)
        except HydraException:
            return ...

    def keep(part: re.Match[str]) -> str:
        bare = part[0].strip()
        typed = parsed(f"key={bare}")
        stays = isinstance(typed, str) or (typed is None and type(None) in types)
        return part[0] if stays else part[0].replace(bare, quote(bare))

    key, _, text = override.partition("=")
    value = parsed(override)
    is_text = value is not ... and all(isinstance(each, str | QuotedString) for each in getattr(value, "list", [value]))
    if not text or (is_text and text == text.strip()):
        return override
    from anomalib_lite.cli import schema  # here: pydantic takes a while

    types = schema.types_of(key.lstrip("+"))
    if str not in types or (isinstance(value, Sweep) and not isinstance(value, ChoiceSweep)):
        return override
    by_parts, is_list = f"{key}={PART.sub(keep, text)}", text.startswith("[") and text.endswith("]")
    if text != text.strip() or parsed(by_parts) is ... or (list not in types and isinstance(value, list | dict)):
        return override if is_list and list in types else f"{key}={quote(text)}"
    return by_parts
