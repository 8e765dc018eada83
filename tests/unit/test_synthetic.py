"""The synthetic set: what is on disk, that it repeats, that it is neither trivial nor wrong."""

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from anomalib_lite.data import corruptions, synthetic, synthetic_drawings
from anomalib_lite.data.synthetic import generate, read_synthetic
from anomalib_lite.data.synthetic_drawings import CATEGORIES, picture
from anomalib_lite.errors import UserError

SMALL: dict[str, Any] = {"size": 64, "train": 3, "good": 2, "defective": 2}
DEFECTS = [(name, kind, split) for name, (_, kinds) in CATEGORIES.items() for split, kind in enumerate(kinds, start=2)]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.png"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "set", **SMALL)


def test_layout_and_counts(small):
    assert [len(kinds) >= 3 for _, kinds in CATEGORIES.values()] == [True] * 4
    assert sorted(p.name for p in small.iterdir() if p.is_dir()) == sorted(CATEGORIES)
    for name, (_, kinds) in CATEGORIES.items():
        assert [p.name for p in sorted((small / name / "train/good").iterdir())] == ["000.png", "001.png", "002.png"]
        assert sorted(p.name for p in (small / name / "test").iterdir()) == sorted(("good", *kinds))
        assert sorted(p.name for p in (small / name / "ground_truth").iterdir()) == sorted(kinds)
        for kind in kinds:
            assert sorted(p.name for p in (small / name / "test" / kind).iterdir()) == ["000.png", "001.png"]


def test_files_hold_what_was_drawn(small):
    for name, kind, split in DEFECTS:
        image, mask = picture(name, kind, 0, 64, split, 1)
        stored: Any = cv2.imread(str(small / name / "test" / kind / "001.png"), cv2.IMREAD_UNCHANGED)
        truth = cv2.imread(str(small / name / "ground_truth" / kind / "001_mask.png"), cv2.IMREAD_UNCHANGED)
        assert stored.shape == ((64, 64) if name == "fabric" else (64, 64, 3))  # fabric is single-channel on disk
        np.testing.assert_array_equal(stored.reshape(image.shape), image[..., ::-1])
        np.testing.assert_array_equal(truth, mask.astype(np.uint8) * 255)


@pytest.mark.parametrize(("name", "kind", "split"), DEFECTS)
def test_mask_is_the_changed_area(name, kind, split):
    for index in range(3):
        image, mask = picture(name, kind, 5, 256, split, index)
        clean, nothing = picture(name, None, 5, 256, split, index)
        change = np.abs(image.astype(int) - clean).max(2)
        assert not nothing.any()
        assert synthetic_drawings.MIN_AREA <= mask.mean() < 0.08
        assert change[~mask].max() <= 16  # what is left out can't be seen
        assert (change[mask] > 4).mean() > 0.9


def test_same_seed_same_bytes_and_other_seed_other_bytes(small, tmp_path):
    assert files(generate(tmp_path / "again", **SMALL)) == files(small)
    other = files(generate(tmp_path / "other", seed=1, **SMALL))
    pictures = [name for name in other if "ground_truth" not in name]
    assert not any(other[name] == files(small)[name] for name in pictures)
    assert len({other[name] for name in pictures}) == len(pictures)


def test_counts_and_choice_of_categories_change_no_picture(small, tmp_path):
    more = files(generate(tmp_path / "more", size=64, train=4, good=3, defective=3, categories=["gear", "wood"]))
    assert not any(name.startswith(("fabric", "board")) for name in more)
    common = [name for name in files(small) if name.startswith(("gear", "wood"))]
    assert all(more[name] == files(small)[name] for name in common)


def test_read_makes_the_set_in_the_cache_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ANOMALIB_LITE_CACHE", str(tmp_path))
    leftover = tmp_path / "synthetic" / ".v1-seed0-size64-3-2-2.killed"  # what a killed process leaves
    (leftover / "gear/train/good").mkdir(parents=True)
    with caplog.at_level("INFO"):
        data = read_synthetic(None, "gear", **SMALL)
    assert len([r for r in caplog.records if r.name == synthetic.__name__]) == 1
    assert (len(data.train), len(data.test)) == (3, 2 + 2 * 5)
    assert all((s.mask is not None) == (s.label == 1) == (s.defect != "good") for s in data.test)
    (made,) = [p for p in (tmp_path / "synthetic").iterdir() if p != leftover]
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert len(read_synthetic(None, ["gear", "wood"], **SMALL).train) == 6
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before
    assert len(read_synthetic(None, "gear", **SMALL | {"seed": 3}).train) == 3
    assert len(list((tmp_path / "synthetic").iterdir())) == 3


def test_failure_leaves_nothing_and_two_at_once_are_harmless(tmp_path, monkeypatch, small):
    def broken(category, defect, seed, size, split, index):
        if category == "board":
            raise RuntimeError("killed")
        return picture(category, defect, seed, size, split, index)

    monkeypatch.setattr(synthetic, "picture", broken)
    with pytest.raises(RuntimeError, match="killed"):
        generate(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: generate(tmp_path / "set", **SMALL), range(2)))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert files(tmp_path / "set") == files(small)


def test_mistakes_are_named(tmp_path, small):
    with pytest.raises(UserError, match=r"bottle.*fabric"):
        generate(tmp_path / "a", categories=["bottle"])
    with pytest.raises(UserError, match="seed"):
        generate(tmp_path / "a", seed=-1)
    with pytest.raises(UserError, match=r"data\.root"):  # another set lies there
        generate(small, **SMALL | {"seed": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.root"):
        generate(tmp_path / "file" / "set", **SMALL)
    assert json.loads((small / synthetic.STAMP).read_text())["version"] == synthetic.VERSION


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_mean_image_does_not_solve_it(category):
    """Difference to the mean training image, plain or smoothed, its maximum or mean: below 0.85 image AUROC."""
    jobs: list[tuple[str | None, int, int]] = []
    jobs += [(None, 0, i) for i in range(40)] + [(None, 1, i) for i in range(16)]
    jobs += [(kind, split, i) for name, kind, split in DEFECTS if name == category for i in range(8)]
    images = np.stack([picture(category, kind, 0, 256, split, i)[0] for kind, split, i in jobs]).astype(np.float32)
    label = np.array([kind is not None for kind, _, _ in jobs[40:]])
    difference = np.abs(images[40:] - images[:40].mean(0)).mean(3)
    scores = {"mean": difference.mean((1, 2)), "max": difference.max((1, 2))}
    for sigma in (2, 4, 8):
        scores[f"max of blur {sigma}"] = [cv2.GaussianBlur(d, (0, 0), sigma).max() for d in difference]
    colours = np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)
    normal = colours[:40]
    scores["colour statistics"] = (((colours[40:] - normal.mean(0)) / normal.std(0)) ** 2).sum(1)
    assert max(roc_auc_score(label, score) for score in scores.values()) < 0.85


def test_defects_and_corruptions_share_no_code():
    def imported(module) -> str:
        nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))
        return " ".join(ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))

    assert "synthetic" not in imported(corruptions)
    assert "corruptions" not in imported(synthetic_drawings)
    assert "corruptions" not in imported(synthetic)
