"""Notes of result.json."""

from anomalib_lite.runs.summary import threshold_notes


def test_thresholds_from_few_images_are_noted():
    """One note for all categories with fewer than 50 normal training images."""
    per_category = {name: {"images": count} for name, count in {"bottle": 49, "cable": 50, "tile": 3}.items()}
    (note,) = threshold_notes({"per_category": per_category})
    assert "fewer than 50 normal training images" in note
    assert note.endswith(": bottle (49), tile (3)")
    assert threshold_notes({"per_category": {"cable": {"images": 50}}}) == []
