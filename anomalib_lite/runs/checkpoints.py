"""Checkpoints that are complete and usable: written beside the old one and replaced, and never with NaN weights."""

import io
import os
import pickle
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from anomalib_lite import __version__
from anomalib_lite.cli.keys import translate
from anomalib_lite.errors import UserError
from anomalib_lite.runs.folder import differences


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint to its own path. Lightning's class writes it below /tmp first, which may be small or full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # on a full disk, torch.save to a file raises a RuntimeError in place of the OSError
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.getbuffer())


class CheckpointWriter:
    """Writes `file`, which is `due` every `minutes` while a run trains.

    Attributes:
        batch: the batch after which the stored checkpoint was written; 0 if it does not exist.
    """

    def __init__(self, file: Path, minutes: float):
        self.file, self.seconds = file, 60 * minutes
        self.batch = 0
        self.checked: list[str] = []
        self.names: set[str] | None = None  # of the tensors that the method's constructor has made, if known
        self.saved = time.perf_counter()

    def start(self, module: L.LightningModule) -> None:
        """Note which tensors of the method are finite before training: a mask of -inf among its buffers is not."""
        self.checked = [name for name, tensor in self.state_of(module).items() if all_finite([tensor])]
        self.saved = time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() - self.saved >= self.seconds

    def save(self, trainer: L.Trainer, batch: int) -> None:
        """Write the checkpoint after `batch`, and before it everything that was logged. All ranks call it together.

        An exception or an interruption leaves the stored checkpoint as it is, and no part of the new one.

        Raises:
            UserError: weights or moments of the optimizers are not finite.
        """
        weights = self.state_of(trainer.lightning_module)
        moments = [x for optimizer in trainer.optimizers for state in optimizer.state.values() for x in state.values()]
        if on_any_rank(trainer, [not all_finite([*(weights[name] for name in self.checked), *moments])])[0]:
            raise self.diverged("weights are NaN or infinite", batch)
        for logger in trainer.loggers:
            logger.save()
        part = self.file.with_suffix(".part")
        try:
            trainer.save_checkpoint(part)  # on all ranks; only rank 0 writes a file
            if trainer.is_global_zero:
                if not self.batch:
                    check_readable(part, type(trainer.lightning_module).__name__)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(self.file)
        finally:
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)
        self.batch, self.saved = batch, time.perf_counter()

    def state_of(self, module: L.LightningModule) -> dict[str, Any]:
        """The method's state. UserError if it has tensors that the constructor does not make: they can't be loaded."""
        state = module.state_dict()
        if late := [name for name in state if self.names is not None and name not in self.names]:
            raise UserError(
                f"{type(module).__name__}: the constructor does not make {', '.join(late[:4])}, so no checkpoint could "
                "be loaded; make them there, a buffer with any shape: self.register_buffer(NAME, torch.empty(0))"
            )
        return state

    def diverged(self, what: str, batch: int) -> UserError:
        if not batch:
            return UserError(
                f"{what} after the fit to the training images; set hardware.precision=32 and cache.dtype=float32, or "
                "check the images"
            )
        stored = f"the checkpoint of batch {self.batch} remains" if self.batch else "there is no checkpoint yet"
        return UserError(
            f"{what} after batch {batch}: training diverged; lower method.optimizer.lr, or set "
            f"hardware.precision=32 ({stored})"
        )


def all_finite(values: Iterable[Any]) -> bool:
    """Whether no tensor among the values holds NaN or infinity; one wait for the device."""
    checks = [torch.isfinite(x).all() for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return bool(torch.stack([check.to(checks[0].device) for check in checks]).all()) if checks else True


def check_readable(file: Path, method: str) -> None:
    """UserError if the checkpoint holds objects that are not read again, because they could hold code."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        raise UserError(
            f"{method}: its checkpoint holds an object of {named[1] if named else 'another type'}; on_save_checkpoint "
            "and the state of optimizers and schedulers may hold plain Python values and tensors only"
        ) from error


def on_any_rank(trainer: L.Trainer, flags: list[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    if trainer.world_size == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=trainer.strategy.root_device)
    return (trainer.strategy.reduce(counts, reduce_op="sum") > 0).tolist()


def read_checkpoint(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside Lightning's part: version, config, fingerprint, categories, finished,
    and of that part the number of batches trained on, `steps`.

    Raises:
        UserError: the file is damaged, was written by a version whose checkpoints can't be read, or was not trained
            with the configuration of its run, `config`.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        stored = content["anomalib_lite"] | {"steps": content["callbacks"]["Training"]["steps"]}
    except Exception as error:
        raise UserError(f"{file}: damaged, or not a checkpoint of ours; remove it and train again") from error
    if stored["version"].split(".")[:2] not in (["0", "1"], __version__.split(".")[:2]):
        raise UserError(f"{file}: written by anomalib_lite {stored['version']}, this is {__version__}; train again")
    for key, trained, now in differences(translate(stored["config"]), config, "resume", "evaluate", "moved"):
        raise UserError(
            f"{file}: trained with {key}={trained}, but its run has {key}={now}; the files of two runs are mixed, "
            "train again in another folder"
        )
    return stored
