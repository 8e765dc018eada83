"""The loss of held-out images over epochs, and thresholds from them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

BUDGET = (
    "data.val_fraction=0.5", "data.batch_size=2", "trainer.max_epochs=3", "trainer.log_every=2",
    "backbone.name=test_resnet.r160_in1k",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=10)
    return root


def rows_of(run: Path) -> dict[int, str]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["step"] for row in rows}) == len(rows)
    return {int(row["step"]): row["held_out_loss"] for row in rows if row["held_out_loss"]}


@pytest.mark.parametrize("name", ["rlr", "uniad"])
def test_after_every_epoch(name, root, tmp_path):
    """The last one by the trained weights on the good held-out images alone; training went on unchanged after each."""
    run = tmp_path / "run"
    runs.result_of(*runs.method(name), *runs.folder_data(root), *BUDGET, run_dir=run)
    rows = rows_of(run)
    assert list(rows) == [3, 6, 9]  # 5 images an epoch, 2 a batch
    stored = json.loads((run / "checkpoints" / "config.json").read_text())["config"]
    with runs.restored():
        data, model = runs.build(stored)
        model.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        model.eval()
        good = [sample for sample in data.val_samples if sample.label == 0]
        losses = []
        for batch in data.val_dataloader():
            for i in range(len(batch["path"])):
                if not int(batch["label"][i]):
                    one = {"image": batch["image"][i : i + 1], "path": ["x"]}
                    losses.append(model.held_out_loss(one).item())
    assert 0 < len(losses) == len(good) < len(data.val_samples)
    assert float(rows[9]) == pytest.approx(sum(losses) / len(losses), rel=0.02)  # bf16 of single images


def test_it_changes_nothing_of_training(root, tmp_path, monkeypatch):
    weights = []
    for kept in (True, False):
        if not kept:
            monkeypatch.delattr("anomalib_lite.methods.uniad.UniAD.held_out_loss")
        run = tmp_path / str(kept)
        runs.result_of(*runs.method("uniad"), *runs.folder_data(root), *BUDGET, run_dir=run)
        weights.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        assert bool("held_out_loss" in (run / "metrics.csv").read_text()) == kept
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_thresholds(root, tmp_path):
    """They are the larger quantile: of the good held-out images, or of the others. A run of before goes on to work."""
    run, limits = tmp_path / "run", {}
    result = runs.result_of(*runs.folder_data(root), *BUDGET, run_dir=run)
    with runs.restored():
        data, _ = runs.build(json.loads((run / "checkpoints" / "config.json").read_text())["config"])
    held_out = {sample.path.name for sample in data.val_samples if sample.label == 0}
    changed = {sample.path.name for sample in data.val_samples} - held_out
    for old in (False, True):
        if old:
            with np.load(run / "maps.npz") as file:
                columns = {key: file[key] for key in file.files if key != "normal/held_out"}
            np.savez(run / "maps.npz", **columns)
        for quantile in (0.2, 0.99):
            out = tmp_path / f"{old} {quantile}"
            arguments = (f"run={run}", f"input={root / 'bottle' / 'train'}", f"output={out}", f"quantile={quantile}")
            outcome = runs.predict(*arguments)
            assert outcome.code == 0, outcome.err
            with (out / "scores.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            scores = {Path(row["path"]).name: float(row["score"]) for row in rows}
            groups = [
                [score for name, score in scores.items() if name not in changed and (name in held_out) == which]
                for which in (False, True)
            ]
            groups = [groups[0] + groups[1]] if old else groups
            limits[old, quantile] = max(float(np.quantile(group, quantile)) for group in groups)
            assert float(rows[0]["threshold"]) == pytest.approx(limits[old, quantile], rel=1e-6)
    assert limits[False, 0.2] != limits[True, 0.2]
    found = result["thresholds"]["per_category"]["bottle"]
    assert found["image"] == pytest.approx(limits[False, 0.99], rel=1e-6)
    assert (found["images"], found["held_out"]) == (10 - len(data.val_samples), len(held_out)) == (5, 3)
