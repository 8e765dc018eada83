"""What happens around a training loop: budget, seeds, checkpoints, scalars, progress."""

import logging
import random
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from anomalib_lite import __version__
from anomalib_lite.cli import signals
from anomalib_lite.console import ProgressBar
from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.held_out import mean_loss
from anomalib_lite.runs.checkpoints import CheckpointWriter, on_any_rank
from anomalib_lite.runs.devices import allow_tf32
from anomalib_lite.runs.run_logger import RunLogger

log = logging.getLogger(__name__)

#: A loss above this multiple of the first batch's loss (or of 1, where that is smaller) ends the run as diverged.
EXPLODED = 1e6


class Training(L.Callback):
    """Counts batches against the budget, seeds every batch, logs scalars, and writes checkpoints.

    Every random number of a batch follows from (seed, batch, rank): a run resumed at any batch continues exactly as if
    it had not been interrupted. A closed form starts from the random state that building the method has left, because
    Lightning seeds again where it joins ranks. A loss that is not finite or has exploded ends the run. The loss is
    checked when it is logged and before every checkpoint, which is written only if weights and optimizer states are
    finite.
    After every epoch the loss of held-out images (data.val_fraction) is logged for methods that define one.

    Args:
        cfg: the resolved configuration, which is stored in checkpoints.
        checkpoint: the file of the last checkpoint.
        total_steps: the budget in batches over all phases of the method; 0 for closed forms.
    """

    def __init__(self, cfg: dict[str, Any], checkpoint: Path, total_steps: int):
        self.cfg, self.seed, self.log_every = cfg, cfg["seed"], cfg["trainer"]["log_every"]
        self.checkpoints = CheckpointWriter(checkpoint, cfg["trainer"]["checkpoint_minutes"])
        self.total_steps, self.random_state = total_steps, torch.get_rng_state()
        self.steps, self.fit_s, self.start = 0, 0.0, time.perf_counter()
        self.first_loss: float | None = None
        self.started = False
        self.held_out: Any = None  # loader of the held-out images, where the method defines a loss of them
        self.bar: ProgressBar | None = None

    def state_dict(self) -> dict[str, Any]:
        fit_s = self.fit_s + time.perf_counter() - self.start
        return {"steps": self.steps, "fit_s": fit_s, "first_loss": self.first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.fit_s, self.first_loss = (state_dict[key] for key in ("steps", "fit_s", "first_loss"))
        self.checkpoints.batch = self.steps

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for key in (module.CHECKPOINT_HYPER_PARAMS_KEY, module.CHECKPOINT_HYPER_PARAMS_NAME):
            checkpoint.pop(key, None)  # of save_hyperparameters(): the configuration holds them, and these are objects
        checkpoint["anomalib_lite"] = {
            "version": __version__,
            "config": self.cfg,
            "fingerprint": data.fingerprint,
            "categories": data.categories,
            "pixels": list(data.pixels),
            "finished": self.finished(module),
        }

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.checkpoints.names = set(module.state_dict())
        self.start = time.perf_counter()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.perf_counter()
        torch.set_rng_state(self.random_state)
        if not self.total_steps:
            self.checkpoints.start(module)  # before a closed form computes its result; its training never starts
        if self.steps:
            log.info("resuming after batch %d", self.steps)
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.keep_until(self.steps)

    def finished(self, module: L.LightningModule) -> bool:
        return self.steps >= self.total_steps or bool(module.stopped_early)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = True
        allow_tf32(module.device.type == "cuda" and self.cfg["hardware"]["precision"] != 32)
        signals.defer()  # until the next batch's checkpoint
        self.checkpoints.start(module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        has_loss = type(module).held_out_loss is not AnomalyModule.held_out_loss  # type: ignore[attr-defined]
        if has_loss and data.val_samples:
            self.held_out = data.val_dataloader()
        self.bar = ProgressBar("training", self.total_steps, self.steps, quiet=not trainer.is_global_zero)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        number = (self.seed * 1_000_003 + self.steps) * 1_009 + trainer.global_rank
        # not torch.manual_seed: without a GPU it stores a stack trace of every call until there is one
        torch.default_generator.manual_seed(number)
        if module.device.type == "cuda":
            torch.cuda.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002  a method may draw from it

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        last, due = self.finished(module), False
        stop = signals.received() and trainer.world_size == 1
        steps_per_epoch = int(trainer.num_training_batches)
        trainer.should_stop = trainer.should_stop or last
        if not outputs and self.steps == 1 and module.automatic_optimization:
            raise UserError(f"{type(module).__name__}.training_step has returned no loss, so nothing would be trained")
        if self.steps % self.log_every == 0 or last or self.steps == 1:
            loss = float(outputs["loss"]) if outputs else float("nan")
            due, stop = self._check(trainer, loss, bool(outputs), last)
            epoch = (self.steps - 1) // steps_per_epoch  # Lightning's count may lag after a resume
            self._log(trainer, {"loss": loss, "epoch": epoch})
            if self.bar:
                self.bar.step(f"loss {loss:.4g}", count=self.steps - self.bar.done)
        if self.held_out is not None and (last or self.steps % steps_per_epoch == 0):
            self._log(trainer, {"held_out_loss": held_out_loss(module, self.held_out)})
        if due or (stop and not last):  # after the last batch the run itself writes one
            self.checkpoints.save(trainer, self.steps)
        if stop and not last:
            signals.release()
            raise signals.Stopped("interrupted by a signal to another rank")

    def _check(self, trainer: L.Trainer, loss: float, has_loss: bool, last: bool) -> tuple[bool, bool]:
        """Whether a checkpoint is due, and whether a signal came; the same on all ranks.

        Raises UserError on all ranks if any rank's loss is bad.
        """
        self.first_loss = loss if self.first_loss is None else self.first_loss
        bad = has_loss and not abs(loss) < EXPLODED * max(1.0, abs(self.first_loss))
        due = trainer.is_global_zero and not last and self.checkpoints.due()
        bad_anywhere, due, stop = on_any_rank(trainer, [bad, due, signals.received()])
        if bad_anywhere:
            what = f"the loss is {loss:.4g}" if bad else "the loss of another device is not finite"
            raise self.checkpoints.diverged(what, self.steps)
        return due, stop

    def _log(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(row, step=self.steps - 1)  # as Lightning logs what a method gives to self.log

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        allow_tf32(False)  # Lightning calls this before the method's own on_train_end
        if self.bar:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        allow_tf32(False)
        signals.release(silently=True)
        if self.bar:
            self.bar.close()

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.fit_s, self.start = self.fit_s + time.perf_counter() - self.start, time.perf_counter()

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the finished training; see `CheckpointWriter.save`."""
        signals.defer()
        self.checkpoints.save(trainer, self.steps)
        signals.release()


def held_out_loss(module: Any, loader: Any) -> float:
    """The mean of the method's `held_out_loss` over all ranks' good held-out images."""
    return float(mean_loss(module, loader, lambda batch: module.held_out_loss(batch)[batch["label"] == 0]))
