"""Saturation thresholds of MVTec LOCO's defects: the area from which on a defect counts as found.

A missing object has no exact place: all places where it could be are annotated, and some of them suffice.
"""

import json
from pathlib import Path
from typing import NamedTuple

from anomalib_lite.errors import UserError

KEYS = ("pixel_value", "saturation_threshold", "relative_saturation")


class Saturation(NamedTuple):
    """The threshold of the defects whose mask has the value `pixel`: pixels, or a share of the area if `relative`."""

    pixel: int
    threshold: float
    relative: bool

    def area(self, defect: int) -> int:
        """The pixels that suffice, of a defect of so many. The share is rounded down, as the authors' code does."""
        return max(1, int(self.threshold * defect) if self.relative else min(int(self.threshold), defect))


def read_saturations(file: Path) -> tuple[Saturation, ...]:
    """The thresholds in a `defects_config.json`. Raises UserError if the file is missing or means nothing."""
    try:
        found = [tuple(entry[key] for key in KEYS) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; sPRO needs its thresholds, take it from the data set") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: not a list of defects with {', '.join(KEYS)} ({why}); restore the file") from None
    for pixel, threshold, relative in found:
        numbers = all(isinstance(value, int | float) and value > 0 for value in (pixel, threshold))
        if not numbers or not isinstance(relative, bool) or (relative and threshold > 1):
            raise UserError(
                f"{file}: pixel_value={pixel}, saturation_threshold={threshold}, relative_saturation={relative} is no "
                "threshold; restore the file"
            )
    return tuple(Saturation(*entry) for entry in found)
