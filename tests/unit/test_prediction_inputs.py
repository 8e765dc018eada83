"""What predict's input= names: the names of links, and where an output would be read next time."""

from anomalib_lite.runs.prediction_inputs import inputs_of, watched_folders
from tests.helpers.image_trees import save_image


def test_links_behind_dots_keep_their_names(tmp_path, monkeypatch):
    """Two links to one file are two images, and a watched link is not the folder that it leads to."""
    (tmp_path / "here").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "today").symlink_to(tmp_path / "in")
    file = save_image(tmp_path / "store" / "0.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).symlink_to(file)
    monkeypatch.chdir(tmp_path / "here")
    found, place = inputs_of("../in"), tmp_path.resolve()
    assert found.images == [place / "in" / "a.png", place / "in" / "b.png"]
    assert found.base == place / "in"
    assert watched_folders("../today").folders == [place / "today"]


def test_a_name_may_begin_with_a_tilde(tmp_path, monkeypatch):
    save_image(tmp_path / "~nobody.png")
    monkeypatch.chdir(tmp_path)
    assert inputs_of("*.png").images == [tmp_path / "~nobody.png"]
