"""metrics.csv: a run's scalars as a table."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from anomalib_lite.paths import replacing
from anomalib_lite.runs import folder
from anomalib_lite.runs.run_logger import RunLogger


class CSVLogger(RunLogger):
    """`metrics.csv` in the run's folder, one row per step. A resumed run retains the rows up to its checkpoint.

    New rows are appended. The file is written anew where a row has a new column, or changes after it was written.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.file = Path(run_dir) / folder.METRICS_LOG
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = []
        self.written = 0  # rows that the file holds, under these columns

    def keep_until(self, step: int) -> None:
        """Read the rows of an interrupted run up to this step."""
        if self.file.is_file():
            whole = self.file.read_text().rpartition("\n")[0].splitlines()  # a killed run may leave a part of a line
            self.rows = [row for row in csv.DictReader(whole) if int(row["step"]) <= step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = (step or 0) + 1  # Lightning counts batches from 0
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1].update(metrics)
            self.written = 0 if self.written == len(self.rows) else self.written
        else:
            self.rows.append({"step": step, **metrics})
        if len(self.rows) % 50 == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self.rows and self.file.is_file():
            return  # a run that was trained before and is only tested now
        columns = list(dict.fromkeys([*self.columns, *(key for row in self.rows[self.written :] for key in row)]))
        if self.written and columns == self.columns:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerows(self.rows[self.written :])
        else:
            with replacing(self.file) as part, part.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns or ["step"])
                writer.writeheader()
                writer.writerows(self.rows)
        self.columns, self.written = columns, len(self.rows)

    def finalize(self, status: str) -> None:
        self.save()
