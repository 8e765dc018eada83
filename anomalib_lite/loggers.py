"""Where a run's scalars go: metrics.csv always, Weights & Biases as well."""

import csv
import logging
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class CSVLogger(Logger):
    """`metrics.csv` in the run's folder, a row a step. A resumed run keeps the rows before its checkpoint."""

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.file = Path(run_dir) / "metrics.csv"
        self.rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def experiment(self) -> None:
        return None

    @property
    def version(self) -> str:
        return ""

    def keep_until(self, step: int) -> None:
        """Take up the rows of an interrupted run, up to this step."""
        if self.file.is_file():
            with self.file.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})
        if len(self.rows) % 50 == 0:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in .hydra/."""

    @rank_zero_only
    def save(self) -> None:
        if not self.rows and self.file.is_file():
            return  # a run that was trained before and is only tested now
        columns = dict.fromkeys(key for row in self.rows for key in row)
        part = self.file.with_name(self.file.name + ".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns) or ["step"])
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.file)

    def finalize(self, status: str) -> None:
        self.save()


def wandb_logger(run_dir: str | Path, project: str = "anomalib_lite", mode: str = "auto", **kwargs: Any) -> Logger:
    """W&B below the run's folder; `mode` auto is online where a key is configured, else offline, never a prompt."""
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "auto":
        netrc = Path.home() / ".netrc"
        key = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    logger = WandbLogger(project=project, save_dir=str(run_dir), mode=mode, **kwargs)
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 names a setting that wandb 0.31 warns of
    return logger


def make_loggers(cfg: Any, run_dir: Path) -> list[Logger]:
    """The loggers of the configuration. One that can't start (no disk, no server) is left out with a warning."""
    from hydra.utils import instantiate

    loggers = []
    for name, logger in cfg.items():
        try:
            made = instantiate(logger, run_dir=str(run_dir))
            _ = made.experiment  # W&B starts here, on rank 0
        except Exception as error:
            if name == "csv":
                raise
            log.warning("logger.%s is left out: %s", name, str(error).splitlines()[0] if str(error) else repr(error))
            continue
        loggers.append(made)
    return loggers


def finish(code: int) -> None:
    """End this process's W&B run, if there is one: a later run of the process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            wandb.finish(exit_code=code)
        except Exception as error:  # the results count more
            log.warning("W&B did not finish: %s", error)
