"""What figures, predict and W&B draw of a map and its score."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_lite.data.dataset import NewImages, collate_readable
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.transforms import Resize
from anomalib_lite.errors import ImageSizeError, UserError
from anomalib_lite.runs.decisions import score_text
from anomalib_lite.runs.figures import TILE, contact_sheet, write_figures
from anomalib_lite.runs.load import LoadedRun
from anomalib_lite.runs.predictions import Predictor
from anomalib_lite.tracking import wandb_report

LIMITS = {"image": 1.0, "pixel": 0.5, "background": 0.0}


@pytest.fixture
def part(tmp_path, monkeypatch) -> Any:
    """Data of one image of 64 pixels, of which the run takes the 32 pixels in the middle; half of these are white."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[24:40, 24:40] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(wandb_report.wandb, "Image", lambda picture, caption, masks: (picture, caption))
    sample = SimpleNamespace(path=tmp_path / "a.png", defect="broken", category="part")
    pipeline = Pipeline([Resize(64), A.CenterCrop(32, 32)])
    return SimpleNamespace(
        eval_pipeline=pipeline, test_samples=[sample], image_size=(32, 32), has_masks={"part": False}, root=tmp_path
    )


def of_a_score(score: float) -> dict[str, Any]:
    return {"scores": np.array([score]), "maps": np.zeros((1, 32, 32)), "masks": np.zeros((1, 32, 32), bool)}


def white_side(picture: np.ndarray) -> float:
    """The side of the white square as a share of the picture's."""
    return float(np.mean(picture.mean(2) > 128) ** 0.5)


def test_a_map_is_drawn_over_the_part_of_the_image_that_it_covers(part, tmp_path):
    path, outputs = part.test_samples[0].path, of_a_score(2)
    predictor = Predictor(None, part, LIMITS, tmp_path / "out", tmp_path, 1, 0, 1, {})  # type: ignore[arg-type]
    predictor._predicted(path, 2.0, torch.zeros(32, 32))
    assert Image.open(tmp_path / "out" / "overlays" / "a.png.png").size == (32, 32)
    sheet = contact_sheet(part, [("clear defect", 0)], outputs, LIMITS, "", {})
    (image, _) = wandb_report._picture(0, "clear defect", LIMITS, part, outputs)
    shown = [predictor.pictures("a.png")[0], sheet[30 : 30 + TILE, 6 : 6 + TILE], image[:, :32]]
    assert [white_side(picture) for picture in shown] == pytest.approx([0.5] * 3, abs=0.02)
    assert white_side(Pipeline([Resize(16)]).shown(path)) == 0.25  # resized maps cover the whole image


@pytest.mark.parametrize(
    ("score", "threshold", "text", "above"),
    [
        (2.0, 1.0, "2.00 x threshold", True),
        (0.5, 1.0, "0.50 x threshold", False),
        (-0.31, -0.42, "-0.31 (threshold -0.42)", True),
        (-0.5, -0.42, "-0.5 (threshold -0.42)", False),
        (0.1, 0.0, "0.1 (threshold 0)", True),
    ],
)
def test_a_score_at_any_threshold(score, threshold, text, above, part):
    """A figure shows a score above its threshold in red."""
    outputs, limits = of_a_score(score), LIMITS | {"image": threshold}
    assert score_text(score, threshold) == text
    assert text in wandb_report._picture(0, "clear defect", limits, part, outputs)[1]
    last_line = contact_sheet(part, [("clear defect", 0)], outputs, limits, "", {})[-30:].astype(int)
    assert (last_line[..., 0] - last_line[..., 1] > 100).any() == above


def test_a_figure_of_any_category_is_below_its_folder(part, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_lite.runs.figures.visualized", lambda *_: {})
    model: Any = None
    folder, outputs = tmp_path / "run" / "figures", of_a_score(2) | {"labels": np.ones(1)}

    def write(category):
        part.categories, part.test_samples[0].category = [category], category
        write_figures(folder, part, outputs, {category: LIMITS}, "", model)

    for category in ("bottle", "line1/bottle", "../x", "/x"):
        write(category)
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.png")}
    assert files == {"bottle.png", "line1/bottle.png", ".._x.png", "_x.png"}
    (folder / "cable.png").mkdir()
    with pytest.raises(OSError, match=r"cable\.png"):
        write("cable")


@pytest.mark.parametrize(("score", "value"), [(np.nan, 0.0), (np.inf, 0.0), (1.0, np.nan)])
def test_no_decision_on_what_is_not_finite(score, value, part, tmp_path):
    path, amap = part.test_samples[0].path, torch.full((32, 32), value)
    predictor = Predictor(None, part, LIMITS, tmp_path / "out", tmp_path, 1, 0, 1, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a\.png: its anomaly map or score is not finite; check"):
        predictor._predicted(path, score, amap)
    outputs = {"score": torch.tensor([score]), "map": amap[None]}
    model: Any = SimpleNamespace(device="cpu", categories=["part"], predict_step=lambda *_: outputs)
    with pytest.raises(UserError, match=r"images\[0\]: its anomaly map or score is not finite; check"):
        LoadedRun(model, part, LIMITS | {"category": "part"}).predict([np.zeros((64, 64, 3), np.uint8)])


def test_an_image_of_a_size_that_the_model_refuses_is_left_out(part, tmp_path):
    """The other images are scored. An error that concerns all images is raised."""
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    shutil.copy(first, second)
    errors: dict[str, Exception] = {str(first): ImageSizeError("images of 64×64: too odd")}

    def predict_step(batch: Any, _: int) -> dict[str, Any]:
        if error := errors.get(batch["path"][0]):
            raise error
        return {"score": torch.ones(1), "map": torch.zeros(1, 32, 32)}

    def new_dataloader(files: list[Path], category: int, *_: int) -> DataLoader:
        images = NewImages(files, category, part.eval_pipeline, "original")
        return DataLoader(images, 1, collate_fn=collate_readable)

    part.new_dataloader = new_dataloader
    model: Any = SimpleNamespace(device=torch.device("cpu"), categories=["part"], predict_step=predict_step)
    limits = LIMITS | {"category": "part"}
    predictor = Predictor(model, part, limits, tmp_path / "out", tmp_path, 1, 0, 1, {})
    found: list[Any] = list(predictor.scored([first, second], quiet=True))
    message, (path, prediction) = found
    assert message == f"{first}: images of 64×64: too odd"
    assert (path, prediction.score) == (second, 1.0)
    assert list(predictor.headers) == [str(second)]
    for error in (UserError("batch['features']: none"), torch.OutOfMemoryError("CUDA out of memory")):
        errors[str(first)] = error
        with pytest.raises(UserError):
            list(predictor.scored([first], quiet=True))
