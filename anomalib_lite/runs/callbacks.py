"""What happens around a training loop: budget, seeds, checkpoints, scalars, progress."""

import logging
import os
import random
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError
from anomalib_lite.methods.held_out import mean_loss
from anomalib_lite.progress import Bar
from anomalib_lite.tracking.csv_logger import CSVLogger

log = logging.getLogger(__name__)


EXPLODED = 1e6  # times the first batch's loss, or times 1 where that is below 1: no training comes back from there


class Training(L.Callback):
    """Counts batches against the budget, seeds every batch, logs scalars, and writes checkpoints.

    Every random number of a batch follows from (seed, batch, rank), so that a run resumed at any batch goes on
    exactly as it would have. A loss that is not finite or has exploded ends the run; it is looked at when it is logged
    and before every checkpoint, which is written only if the weights and the optimizers' states are finite, too.
    After every epoch it logs the loss of held-out images (data.val_fraction) of methods that define one.
    """

    def __init__(self, cfg: dict[str, Any], checkpoint: Path, data: AnomalyDataModule):
        budget = cfg["trainer"]
        self.seed, self.log_every, self.every = cfg["seed"], budget["log_every"], 60 * budget["checkpoint_minutes"]
        self.max_steps, self.max_epochs = budget["max_steps"], budget["max_epochs"]
        self.cfg, self.checkpoint, self.data = cfg, checkpoint, data
        self.steps, self.fit_s = 0, 0.0
        self.first_loss: float | None = None
        self.kept = 0  # the batch after which the checkpoint was written
        self.begun = False
        self.watched: list[str] = []
        self.held_out: Any = None  # loader of the held-out images, where the method has a loss of theirs
        self.bar: Bar | None = None

    def state_dict(self) -> dict[str, Any]:
        fit_s = self.fit_s + time.perf_counter() - self.start
        return {"steps": self.steps, "fit_s": fit_s, "first_loss": self.first_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.fit_s = state_dict["steps"], state_dict["fit_s"]
        self.first_loss, self.kept = state_dict.get("first_loss"), self.steps

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        from anomalib_lite import __version__

        checkpoint["anomalib_lite"] = {
            "version": __version__,
            "config": self.cfg,
            "fingerprint": self.data.fingerprint,
            "categories": self.data.categories,
            "finished": self.finished(trainer),
        }

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.start = self.saved = time.perf_counter()
        self.data.batches_done = lambda: self.steps

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.data.batches_done = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = self.saved = time.perf_counter()
        if self.steps:
            log.info("going on from batch %d", self.steps)
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.keep_until(self.steps)

    def total(self, trainer: L.Trainer) -> int | None:
        epochs = None if self.max_epochs is None else self.max_epochs * int(trainer.num_training_batches)
        phase = min((n for n in (self.max_steps, epochs) if n is not None), default=None)
        return None if phase is None else phase * getattr(trainer.lightning_module, "phases", 1)

    def finished(self, trainer: L.Trainer) -> bool:
        total = self.total(trainer) if self.max_epochs != 0 else 0
        return (total is not None and self.steps >= total) or getattr(trainer.lightning_module, "stopped_early", False)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun, module.total_steps = True, self.total(trainer) or 0  # type: ignore[assignment]
        # a mask of -inf among the buffers is none of training's doing
        self.watched = [name for name, tensor in module.state_dict().items() if all_finite([tensor])]
        if getattr(module, "held_out_loss", None) and self.data.val_samples:
            self.held_out = self.data.val_dataloader()
        self.bar = Bar("training", self.total(trainer), self.steps, quiet=not trainer.is_global_zero)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        number = (self.seed * 1_000_003 + self.steps) * 1_009 + trainer.global_rank
        # not torch.manual_seed: without a GPU it keeps a stack trace of every call for the day when there is one
        torch.default_generator.manual_seed(number)
        if module.device.type == "cuda":
            torch.cuda.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002  a method may draw from it

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        last, due, batches = self.finished(trainer), False, int(trainer.num_training_batches)
        if last:
            trainer.should_stop = True
        if self.steps % self.log_every == 0 or last or self.steps == 1:
            loss = float(outputs["loss"]) if outputs else float("nan")
            self.first_loss = loss if self.first_loss is None else self.first_loss
            bad = bool(outputs) and not abs(loss) < EXPLODED * max(1.0, abs(self.first_loss))
            due = trainer.is_global_zero and not last and time.perf_counter() - self.saved >= self.every
            bad_anywhere, due = on_any_rank(trainer, [bad, due])  # all stop together, and all save together
            if bad_anywhere:
                self.fail(f"the loss is {loss:.4g}" if bad else "the loss of another device is not finite")
            if trainer.is_global_zero:
                epoch = (self.steps - 1) // batches  # Lightning's may lag after a resume
                for logger in trainer.loggers:
                    logger.log_metrics({"loss": loss, "epoch": epoch}, step=self.steps)
            if self.bar:
                self.bar.step(f"loss {loss:.4g}", count=self.steps - self.bar.done)
        if self.held_out is not None and (last or self.steps % batches == 0):
            loss = held_out_loss(module, self.held_out)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics({"held_out_loss": loss}, step=self.steps)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self.bar:
            self.bar.close()

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.fit_s, self.start = self.fit_s + time.perf_counter() - self.start, time.perf_counter()

    def fail(self, what: str) -> NoReturn:
        kept = f"the checkpoint of batch {self.kept} is kept" if self.kept else "there is no checkpoint yet"
        raise UserError(
            f"{what} after batch {self.steps}: training diverged; lower method.optimizer.lr, or set "
            f"hardware.precision=32 ({kept})"
        )

    def save(self, trainer: L.Trainer) -> None:
        """Write checkpoints/last.ckpt whole or not at all, and before it what was logged up to it.

        Raises UserError if there are weights that are not finite any more; the checkpoint before stays.
        """
        weights = trainer.lightning_module.state_dict()
        moments = [x for optimizer in trainer.optimizers for state in optimizer.state.values() for x in state.values()]
        if on_any_rank(trainer, [not all_finite([*(weights[name] for name in self.watched), *moments])])[0]:
            self.fail("weights are NaN or infinite")
        for logger in trainer.loggers:
            logger.save()
        part = self.checkpoint.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.checkpoint)
        self.kept = self.steps
        self.saved = time.perf_counter()


def all_finite(values: Iterable[Any]) -> bool:
    """Whether no tensor among them holds NaN or infinity; one wait for the device."""
    checks = [torch.isfinite(x).all() for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return bool(torch.stack([check.to(checks[0].device) for check in checks]).all()) if checks else True


def held_out_loss(module: Any, loader: Iterable[Any]) -> float:
    """The mean of the method's `held_out_loss` over all ranks' good held-out images."""
    return float(mean_loss(module, loader, lambda batch: module.held_out_loss(batch)[batch["label"] == 0]))


def on_any_rank(trainer: L.Trainer, flags: list[bool]) -> list[bool]:
    """Each flag: whether it is raised on any rank."""
    if trainer.world_size == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=trainer.strategy.root_device)
    return (trainer.strategy.reduce(counts, reduce_op="sum") > 0).tolist()


def quiet() -> None:
    """Silence what Lightning and timm say of things that are meant here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists a file's missing tensors; backbones.py judges them
    for message in (
        r".*have no `validation_step`.*",
        r".*does not have many workers.*",
        r".*smaller than the logging interval.*",
        r".*module\(s\) in eval mode.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*configure_optimizers` returned `None`.*",
        r".*trying to infer the `batch_size`.*",
        r".*resuming from a checkpoint that ended before the epoch.*",  # ours is resumable: batches_done
        r".*Using `DistributedSampler` with the dataloaders.*",
        r".*`Trainer\(barebones=True\)`.*",
        r".*one pass will not be enough.*",
        r"Total length of `DataLoader` across ranks is zero.*",  # no test images: a note of the result says so
    ):
        warnings.filterwarnings("ignore", message)
