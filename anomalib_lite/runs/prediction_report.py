"""report.html of predict: the images with the highest scores on one page that needs nothing but itself."""

import contextlib
import heapq
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from PIL import Image

from anomalib_lite.errors import UserError
from anomalib_lite.paths import file_name, readable, write_text
from anomalib_lite.runs.folder import OVERLAYS, REPORT
from anomalib_lite.runs.heat_maps import data_uri
from anomalib_lite.runs.prediction_table import Prediction

SIDE = 320  # pixels of a picture's longer side at most, so that the page stays below 5 MB
MOST_LEFT_OUT = 100  # lines

Pictures = tuple[np.ndarray, np.ndarray]  # an image and its overlay, uint8 [H, W, 3] each


class Report:
    """Collects predictions. Only the pictures that the page shows are kept, as small JPEGs within the page.

    Args:
        most: number of images on the page at most; 0: no page.
        about: heading -> text, shown above the table.
        earlier: reads the pictures of a name that was scored in an earlier session.
    """

    def __init__(self, most: int, about: dict[str, str], earlier: Callable[[str], Pictures]):
        self.most, self.about, self.earlier = most, about, earlier
        self.rows: dict[str, Prediction] = {}
        self.shown: dict[str, tuple[str, str]] = {}  # the image and its overlay as data URIs, by name

    def add(self, prediction: Prediction, pictures: Pictures) -> None:
        """Add an image; it replaces one of the same name."""
        self.shown.pop(prediction.name, None)
        self.rows[prediction.name] = prediction
        lowest = min(self.shown, key=lambda name: self.rows[name].score) if len(self.shown) >= self.most > 0 else None
        if self.most and (lowest is None or prediction.score > self.rows[lowest].score):
            self.shown[prediction.name] = _small(pictures)
            if lowest is not None:
                del self.shown[lowest]

    def write(self, output: Path, left_out: Sequence[str]) -> None:
        """Write the page into the folder, whole or not at all."""
        if not self.most:
            return
        worst = heapq.nlargest(self.most, self.rows.values(), key=lambda each: each.score)
        for name in (each.name for each in worst if each.name not in self.shown):
            with contextlib.suppress(UserError):  # gone since it was scored
                self.shown[name] = _small(self.earlier(name))
        self.shown = {each.name: self.shown[each.name] for each in worst if each.name in self.shown}
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("prediction_report.html").render(
            about=self._about(len(left_out)),
            worst=[(each, *self.shown.get(each.name, ("", "")), _link(each.name)) for each in worst],
            count=len(self.rows),
            left_out=[readable(line) for line in left_out[:MOST_LEFT_OUT]],
            left_out_count=len(left_out),
        )
        write_text(output / REPORT, page)

    def _about(self, left_out: int) -> dict[str, str]:
        defective = sum(each.decision == "defective" for each in self.rows.values())
        counts = f"{defective} defective, {len(self.rows) - defective} good" + f", {left_out} left out" * bool(left_out)
        return {"images": counts} | self.about


def _link(name: str) -> str:
    """From the page to an overlay's file."""
    return quote(os.fsencode(f"{OVERLAYS}/{file_name(name)}.png"))


def _small(pictures: Pictures) -> tuple[str, str]:
    def uri(picture: np.ndarray) -> str:
        image: Any = Image.fromarray(np.ascontiguousarray(picture))
        image.thumbnail((SIDE, SIDE), reducing_gap=2)
        return data_uri(image, "JPEG", quality=85)

    return uri(pictures[0]), uri(pictures[1])
