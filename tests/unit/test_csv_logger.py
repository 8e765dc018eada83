"""metrics.csv: appended while a run trains, and at its end as if it had been written at once."""

import csv
import io
import random
from pathlib import Path

import pytest

from anomalib_lite.runs.build import make_loggers
from anomalib_lite.tracking.csv_logger import CSVLogger


def written_at_once(rows: list[tuple[int, dict[str, float]]]) -> str:
    """The table of all rows, with the columns in the order in which they occur first. Batches are counted from 0."""
    merged: dict[int, dict[str, float]] = {}
    for batch, values in rows:
        merged.setdefault(batch, {"step": batch + 1}).update(values)
    columns = dict.fromkeys(key for row in merged.values() for key in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(merged.values())
    return text.getvalue()


def read(folder: Path) -> str:
    with (folder / "metrics.csv").open(newline="") as file:
        return file.read()


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_rows_and_saves(seed, tmp_path):
    numbers, logger = random.Random(seed), CSVLogger(tmp_path)
    rows, step = [], 0
    for _ in range(160):
        step += numbers.random() < 0.8
        rows.append((step, {numbers.choice(["loss", "epoch", "held_out_loss"]): numbers.random()}))
        logger.log_metrics(rows[-1][1], rows[-1][0])
        if numbers.random() < 0.1:
            logger.save()
            assert read(tmp_path) == written_at_once(rows)
    logger.finalize("success")
    assert read(tmp_path) == written_at_once(rows)


def test_rows_are_appended(tmp_path, monkeypatch):
    """A long run does not write its table anew for each row."""
    logger, rows = CSVLogger(tmp_path), [(n, {"loss": n / 7}) for n in range(1000)]
    logger.log_metrics(rows[0][1], 0)
    logger.save()
    monkeypatch.setattr("anomalib_lite.tracking.csv_logger.replacing", None)  # would raise
    for step, values in rows[1:]:
        logger.log_metrics(values, step)
    logger.save()
    assert read(tmp_path) == written_at_once(rows)


def test_a_part_of_a_line_is_dropped(tmp_path):
    """A run that was killed while it wrote step 1200 must not be read as step 12."""
    (tmp_path / "metrics.csv").write_bytes(b"step,loss\r\n5,0.5\r\n40,0.25\r\n12")
    logger = CSVLogger(tmp_path)
    logger.keep_until(20)
    logger.log_metrics({"loss": 0.1}, 20)
    logger.save()
    assert read(tmp_path) == "step,loss\r\n5,0.5\r\n21,0.1\r\n"


def test_loggers_without_options_are_left_out(tmp_path):
    """As with logger.wandb=null, or ~logger."""
    options = {"_target_": "anomalib_lite.tracking.csv_logger.CSVLogger"}
    assert [type(logger) for logger in make_loggers({"csv": options, "wandb": None}, tmp_path)] == [CSVLogger]
    assert make_loggers(None, tmp_path) == []
