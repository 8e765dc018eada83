"""Which curves a run stores, and how their axes are called. Imports nothing heavy."""

from typing import NamedTuple


class Curve(NamedTuple):
    """The keys of a curve's points in maps.npz, the names of its axes, and where its x axis ends."""

    x: str
    y: str
    x_name: str = "false positive rate"
    y_name: str = "true positive rate"
    limit: float = 1


CURVES = {
    "image ROC": Curve("image_fpr", "image_tpr"),
    "image PR": Curve("image_recall", "image_precision", "recall", "precision"),
    "pixel ROC": Curve("pixel_fpr", "pixel_tpr"),
    "pixel PR": Curve("pixel_recall", "pixel_precision", "recall", "precision"),
    "PRO": Curve("pro_fpr", "pro", y_name="region overlap", limit=0.3),
}
