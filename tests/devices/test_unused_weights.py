"""Options that leave a part of a network out: its weights have no gradient, which several devices must know."""

import json

import torch
from torch import nn

from anomalib_lite.methods.base import AnomalyModule
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.ranks import on_ranks

CASES = {
    "zero_fill": ("rlr", "method.zero_fill=true"),
    "fixed key": ("rlr", "method.mix=[0,1]", "method.learnable_key=false"),
    "two phases": ("ltad", "method.fill=largest"),
    "outside": ("half",),
}
CONFIG = f"""
# @package _global_
method:
  _target_: {__name__}.Half
  optimizer: {{_target_: torch.optim.SGD, _partial_: true, lr: 0.1}}
"""


class Half(AnomalyModule):
    """A user's method, the second half of which learns in every second step."""

    unused_parameters = True

    def __init__(self, **context):
        super().__init__(**context)
        self.first, self.second = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)

    def training_step(self, batch, batch_idx):
        used = self.first if self.global_step % 2 else self.second
        return used(batch["image"]).square().mean()

    def anomaly_map(self, batch):
        return (self.first(batch["image"]) + self.second(batch["image"]))[:, 0].square()


def test_they_train_on_two_ranks(tmp_path):
    root = tmp_path / "data"
    make_mvtec(root, "bottle", train=6, good=2, defects={"broken": 2})
    make_mvtec(root, "tile", train=2, good=1, defects={"crack": 1})
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "half.yaml").write_text(CONFIG)
    common = [
        f"--config-dir={tmp_path / 'conf'}", "hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2",
        "hardware.measure_cost=false", "hardware.threads=1", "backbone=resnet18",
        "backbone.name=test_resnet.r160_in1k", "backbone.weights=none", "data.image_size=32", "data.batch_size=4",
        "logger=csv", "trainer.max_epochs=null", "trainer.max_steps=4", "cache.enabled=false",
        *runs.folder_data(root, "[bottle,tile]"),
    ]  # fmt: skip
    each = [
        [*common, *runs.method(method), *options, f'hydra.run.dir="{tmp_path / name}"']
        for name, (method, *options) in CASES.items()
    ]
    on_ranks("train", each[0], 2, *each[1:])
    for name in CASES:
        assert json.loads((tmp_path / name / "result.json").read_text())["timing"]["steps"] in (4, 8), name
        weights = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.isfinite(x).all() for key, x in weights.items() if "fixed_states" not in key), name
