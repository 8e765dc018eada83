"""scores.csv of predict: one row per image. A watched folder's table grows row by row and is continued later."""

import csv
import errno
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from anomalib_lite.errors import UserError
from anomalib_lite.runs.decisions import ratio

COLUMNS = ("path", "score", "threshold", "decision", "ratio")
MODIFIED = "modified"  # a further column of watched folders: when the file was changed, in ns since 1970
END = "\r\n"


class Prediction(NamedTuple):
    """An image's score and what follows from it.

    Attributes:
        name: the path below the folder that all inputs share.
        ratio: as `decisions.ratio` gives it.
    """

    name: str
    score: float
    threshold: float

    @property
    def decision(self) -> str:
        return "defective" if self.score > self.threshold else "good"

    @property
    def ratio(self) -> float | None:
        return ratio(self.score, self.threshold)

    def row(self) -> list[str]:
        """The values of COLUMNS."""
        ratio = "" if self.ratio is None else repr(self.ratio)
        return [self.name, repr(self.score), repr(self.threshold), self.decision, ratio]


class GrowingTable:
    """A table that is complete after each row: a row is one system call, and half a row of a machine that lost its
    power is removed at the next start.

    Attributes:
        rows: the predictions that the file held at the start, the last one of each name.
        modified: of these names, the time when the file was changed.
    """

    def __init__(self, file: Path):
        self.rows, self.modified = dict[str, Prediction](), dict[str, int]()
        content = file.read_bytes() if file.exists() else b""
        end = END.encode() if END.encode() in content else b"\n"
        whole = content[: content.rfind(end) + len(end)] if end in content else b""
        if whole or not ",".join([*COLUMNS, MODIFIED]).encode().startswith(content.rstrip()):  # before it is changed
            for name, score, threshold, modified in _rows(file, whole):
                self.rows[name] = Prediction(name, score, threshold)
                self.modified[name] = modified
        self.path = file
        self.file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self.file, len(whole))
        if not whole:
            self._write([*COLUMNS, MODIFIED])

    def add(self, prediction: Prediction, modified: int) -> None:
        self._write([*prediction.row(), str(modified)])
        self.modified[prediction.name] = modified

    def close(self) -> None:
        os.close(self.file)

    def _write(self, values: Sequence[str]) -> None:
        text, size = io.StringIO(), os.fstat(self.file).st_size
        csv.writer(text, lineterminator=END).writerow(values)
        if os.write(self.file, row := text.getvalue().encode()) < len(row):
            os.ftruncate(self.file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _rows(file: Path, content: bytes) -> Iterator[tuple[str, float, float, int]]:
    reader = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    try:
        if next(reader, None) != [*COLUMNS, MODIFIED]:
            raise UserError(f"{file}: not the table of a watched folder; choose another output=DIR")
        for name, score, threshold, _, _, modified in reader:
            yield name, float(score), float(threshold), int(modified)
    except (ValueError, csv.Error) as error:
        why = f"line {reader.line_num}: {error}"
        raise UserError(f"{file}: not readable ({why}); choose another output=DIR") from error
