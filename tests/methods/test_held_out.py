"""The loss of held-out images over epochs."""

import csv
import json
from pathlib import Path

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
