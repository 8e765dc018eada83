"""metrics.csv: a run's scalars as a table."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from anomalib_lite.paths import replacing
from anomalib_lite.runs import folder
from anomalib_lite.runs.run_logger import RunLogger


class CSVLogger(RunLogger):
    """`metrics.csv` in the run's folder, one row per step. A resumed run retains the rows up to its checkpoint."""

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.file = Path(run_dir) / folder.METRICS_LOG
        self.rows: list[dict[str, Any]] = []

    def keep_until(self, step: int) -> None:
        """Read the rows of an interrupted run up to this step."""
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
    def save(self) -> None:
        if not self.rows and self.file.is_file():
            return  # a run that was trained before and is only tested now
        columns = dict.fromkeys(key for row in self.rows for key in row)
        with replacing(self.file) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns) or ["step"])
            writer.writeheader()
            writer.writerows(self.rows)

    def finalize(self, status: str) -> None:
        self.save()
