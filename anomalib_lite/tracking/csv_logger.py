"""Where a run's scalars go: metrics.csv always, Weights & Biases (wandb_run.py) as well."""

import csv
import logging
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

    def start(self, *args: Any) -> None:
        """The file appears with its first rows."""

    def log_test(self, *args: Any) -> None:
        """The test's results are in files of their own."""

    def keep_until(self, step: int) -> None:
        """Take up the rows of an interrupted run, up to this step."""
        if self.file.is_file():
            with self.file.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1].update(metrics)
        else:
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


def make_loggers(cfg: Any, run_dir: Path) -> list[Logger]:
    """The loggers of the configuration. One that can't be made is left out with a warning."""
    from hydra.utils import instantiate

    loggers = []
    for name, logger in cfg.items():
        try:
            loggers.append(instantiate(logger, run_dir=str(run_dir)))
        except Exception as error:
            if name == "csv":
                raise
            log.warning("logger.%s is left out: %s", name, str(error).splitlines()[0] if str(error) else repr(error))
    return loggers
