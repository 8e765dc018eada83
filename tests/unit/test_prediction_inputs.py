"""What predict's input= names: the names of links, and where an output would be read next time."""

from pathlib import Path

import pytest

from anomalib_lite.errors import UserError
from anomalib_lite.runs.prediction_inputs import inputs_of, refuse_inside, watched_folders
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


@pytest.mark.parametrize(
    ("pattern", "base", "output", "searched"),
    [
        ("**/*.png", "", "out", True),
        ("**", "", "out", True),
        ("a*/**/1.p*", "a", "a/out", True),
        ("[b,{here}/**/1.png]", "", "out", True),
        ("a*/**/1.p*", "a", "out", False),
        ("**/*.jpg", "a", "out", False),
        ("**/*.[pP][nN][gG]", "", "out", True),
        ("*/*.png", "", "out", False),
        ("a/*.png", "a", "a/out", False),
    ],
)
def test_an_output_that_a_recursive_pattern_would_find(pattern, base, output, searched, tmp_path, monkeypatch):
    """Its pictures would be scored by the next call. What a pattern searches changes no name of a result."""
    for name in ("a/1.png", "a/1.jpg", "b/1.png"):
        save_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = inputs_of(pattern.format(here=tmp_path))
    assert found.base == tmp_path / base
    if searched:
        with pytest.raises(UserError, match=f"output={output} lies inside input=.*: choose a folder outside"):
            refuse_inside(Path(output), found.folders, watch=False)
    else:
        refuse_inside(Path(output), found.folders, watch=False)
