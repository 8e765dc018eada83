"""A checkpoint is written beside the old one, and nothing remains of one that could not be written."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anomalib_lite.cli.messages import one_line
from anomalib_lite.runs.checkpoints import CheckpointFile, CheckpointWriter

STATE = {"weight": torch.arange(3.0)}


@pytest.fixture
def trainer() -> Any:
    """What `CheckpointWriter.save` needs of a trainer."""
    model = SimpleNamespace(state_dict=lambda: STATE)
    save = partial(CheckpointFile().save_checkpoint, STATE)
    return SimpleNamespace(
        lightning_module=model, optimizers=[], loggers=[], world_size=1, is_global_zero=True, save_checkpoint=save
    )


@pytest.fixture
def writer(trainer, tmp_path) -> CheckpointWriter:
    """It has written the checkpoint of batch 1."""
    written = CheckpointWriter(tmp_path / "last.ckpt", minutes=5)
    written.save(trainer, 1)
    return written


def assert_unchanged(writer: CheckpointWriter) -> None:
    """The checkpoint of batch 1 is there, and no part of another one."""
    assert [each.name for each in writer.file.parent.iterdir()] == [writer.file.name]
    torch.testing.assert_close(torch.load(writer.file, weights_only=True), STATE, rtol=0, atol=0)
    assert writer.batch == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk(writer, trainer):
    writer.file.with_suffix(".part").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        writer.save(trainer, 2)
    line = one_line(caught.value, outside=False, folder="hydra.run.dir")
    assert line is not None
    assert line.startswith("the folder of the results: No space left on device; fix the path, or choose another folder")
    assert_unchanged(writer)


def test_an_interruption_within_the_write(writer, trainer):
    def interrupted(part: Path) -> None:
        part.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    trainer.save_checkpoint = interrupted
    with pytest.raises(KeyboardInterrupt):
        writer.save(trainer, 2)
    assert_unchanged(writer)
