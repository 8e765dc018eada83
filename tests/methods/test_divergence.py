"""Training that diverges, and batches that are too large: one line that says what to do, and no bad checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anomalib_lite.errors import enough_memory
from anomalib_lite.methods.base import AnomalyModule
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.ranks import start_ranks

CONFIG = f"""
# @package _global_
defaults:
  - override /backbone: none
method:
  _target_: {__name__}.Sick
  how: none
  at: 0
  rank: 0
  optimizer: {{_target_: torch.optim.Adam, _partial_: true, lr: 1e-2}}
data: {{batch_size: 4, image_size: 32}}
trainer: {{max_steps: 8}}
"""


class Sick(AnomalyModule):
    """Falls ill in batch `at`, on one rank."""

    def __init__(self, how: str, at: int, rank: int, **context: Any):
        super().__init__(**context)
        self.how, self.at, self.rank = how, at, rank
        self.net = nn.Conv2d(3, 4, 3, 2, 1)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))  # as attention has it: no fault

    def training_step(self, batch, batch_idx):
        loss = self.anomaly_map(batch).mean()
        if self.trainer.global_step + 1 < self.at or self.trainer.global_rank != self.rank:
            return loss
        if self.how == "gradient":
            return loss + (0 * self.net.weight.sum()).sqrt()  # a finite loss, whose gradient is not
        if self.how == "memory":
            torch.empty(len(batch["image"]) << 48)
        return loss * {"undefined": float("nan"), "infinite": float("inf"), "explode": 1e9}.get(self.how, 1.0)

    def anomaly_map(self, batch):
        if self.how == "test memory" and not self.training:
            torch.empty(len(batch["image"]) << 48)
        return self.net(batch["image"]).square().mean(1)


class SickClosedForm(AnomalyModule):
    """Computes from the training images what is not a number."""

    mean: torch.Tensor

    def __init__(self, how: str, at: int, rank: int, **context: Any):
        super().__init__(**context)
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def on_fit_start(self):
        self.mean /= 0

    def anomaly_map(self, batch):
        return (batch["image"] - self.mean).square().mean(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sick")
    make_mvtec(folder / "data", train=8)
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "conf" / "method" / "sick.yaml").write_text(CONFIG)
    data = runs.folder_data(folder / "data")
    return [f"--config-dir={folder / 'conf'}", "hardware=cpu", "hardware.threads=1", "logger=csv", "method=sick", *data]


def train(base, run: Path, *more: str) -> runs.Outcome:
    return runs.train(*base, *more, f"hydra.run.dir={run}", small=False)


def stored_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("how", "log_every", "checkpoint", "noticed", "message"), [
    ("undefined", 2, 4, 6, "the loss is nan"), ("infinite", 1, 4, 5, "the loss is inf"),
    ("explode", 2, 4, 6, "the loss is "), ("gradient", 2, 4, 6, "the loss is nan"),
    ("gradient", 1, 4, 5, "weights are NaN or infinite"), ("undefined", 3, 3, 6, "the loss is nan"),
    ("undefined", 4, 4, 8, "the loss is nan"),
])  # fmt: skip
def test_the_last_good_checkpoint_remains(base, tmp_path, how, log_every, checkpoint, noticed, message):
    """Ill in batch 5; the loss is looked at, and a checkpoint written, every `log_every` batches."""
    often = (f"trainer.log_every={log_every}", "trainer.checkpoint_minutes=0")
    outcome = train(base, tmp_path, f"method.how={how}", "method.at=5", *often)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    first, _, rest = line.partition(f" after batch {noticed}: training diverged; ")
    assert first.startswith(f"error: {message}")
    assert (
        rest
        == f"lower method.optimizer.lr, or set hardware.precision=32 (the checkpoint of batch {checkpoint} remains)"
    )
    stored = stored_checkpoint(tmp_path)
    assert stored["global_step"] == checkpoint
    assert all(stored["state_dict"][f"net.{name}"].isfinite().all() for name in ("weight", "bias"))
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "result.json").exists()


def test_weights_that_go_bad_with_the_last_batch(base, tmp_path):
    """The loss of that batch is still finite."""
    often = ("trainer.log_every=1", "trainer.checkpoint_minutes=0")
    outcome = train(base, tmp_path, "method.how=gradient", "method.at=8", *often)
    assert outcome.code == 2
    assert "weights are NaN or infinite after batch 8: training diverged" in outcome.err
    assert stored_checkpoint(tmp_path)["global_step"] == 7


def test_a_closed_form_that_is_not_finite(base, tmp_path):
    outcome = train(base, tmp_path, f"method._target_={__name__}.SickClosedForm")
    runs.assert_refused(
        outcome, "weights are NaN or infinite after the fit to the training images; set hardware.precis"
    )
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_checkpoint_the_folder_is_free(base, tmp_path):
    outcome = train(base, tmp_path, "method.how=undefined", "method.at=2", "trainer.log_every=1")
    assert outcome.code == 2
    assert outcome.err.endswith("(there is no checkpoint yet)\n")
    assert train(base, tmp_path).code == 0


def test_a_resumed_run_names_the_stored_checkpoint(base, tmp_path):
    often = ("trainer.log_every=3", "trainer.checkpoint_minutes=0", "method.how=undefined", "method.at=5")
    assert train(base, tmp_path, *often).code == 2
    again = train(base, tmp_path, *often, "resume=true")
    assert again.code == 2
    assert "(the checkpoint of batch 3 remains)" in again.err


def test_a_learning_rate_that_is_far_too_high(tmp_path):
    make_mvtec(tmp_path / "data", train=8)
    data = runs.folder_data(tmp_path / "data")
    outcome = runs.train(
        "method=norm_occ",
        "method.optimizer.lr=1e30",
        "trainer.max_epochs=9",
        *data,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2
    assert "training diverged; lower method.optimizer.lr" in outcome.err


@pytest.mark.parametrize(
    ("how", "option"), [("memory", "data.batch_size=4"), ("test memory", "data.eval_batch_size=32")]
)
def test_too_little_memory(base, tmp_path, how, option):
    """PyTorch's own allocator refuses, in training or in test."""
    outcome = train(base, tmp_path, f"method.how={how}", "method.at=3")
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if "error" in line]
    assert line == (
        f"error: out of memory: {option} images of this size are too many for this device; give a smaller one, or a "
        "smaller data.image_size"
    )


def test_errors_that_are_not_about_memory_pass():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory(lambda: "data.batch_size", {}, {}):
        raise RuntimeError("shapes do not fit")


def test_gpu_errors_are_known():
    from anomalib_lite.errors import UserError

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    ):
        with (
            pytest.raises(
                UserError, match=r"data\.batch_size=7 .* hardware\.feature_gpu_gb=0 \(.* takes 2\.5 GB\)$"
            ) as found,
            enough_memory(lambda: "data.batch_size", {"data": {"batch_size": 7}}, {"gpu_gb": 2.5}),
        ):
            raise error
        assert ("cuDNN that does not fit" in str(found.value)) == (type(error) is RuntimeError)


@pytest.mark.slow
def test_all_ranks_stop_together(base, tmp_path):
    """Only the second one sees the loss that is not finite."""
    often = (
        "method.how=infinite",
        "method.at=3",
        "method.rank=1",
        "trainer.log_every=2",
        "trainer.checkpoint_minutes=0",
    )
    ranks = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")
    options = [x for x in base if x != "hardware=cpu"]
    started = start_ranks("train", [*options, *often, *ranks, f"hydra.run.dir={tmp_path / 'run'}"], 2)
    for process in started:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in started] == [1, 1]  # 1 is what start_ranks makes of exit code 2
    assert stored_checkpoint(tmp_path / "run")["global_step"] == 2
