"""A folder whose new images are scored as they arrive, until the user ends it."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalib_lite.cli import signals
from anomalib_lite.data.image_files import IMAGE_SUFFIXES
from anomalib_lite.data.image_folders import CLUTTER, classified
from anomalib_lite.errors import UserError
from anomalib_lite.paths import readable, write_text
from anomalib_lite.runs import folder
from anomalib_lite.runs.prediction_table import GrowingTable
from anomalib_lite.runs.predictions import Predictor

POLL = 1.0  # seconds between two looks at the folders
PATIENCE = 10.0  # seconds that an unreadable file may take to become readable
MOST = 256  # images between two looks
REFRESH = 5.0  # seconds between two versions of the report at least

Signature = tuple[int, int]  # when a file was changed, in ns, and its size


@dataclass
class Seen:
    """A file as it was at the last look: since when it is unchanged, and whether nothing is left to do."""

    signature: Signature
    since: float
    done: bool = False


class Arrivals:
    """The files below folders that are complete and not scored yet.

    Args:
        modified: of names below `base` that are scored already, when these files were changed.
    """

    def __init__(self, folders: Sequence[Path], base: Path, modified: dict[str, int]):
        self.folders, self.base, self.modified = folders, base, modified
        self.seen: dict[Path, Seen] = {}

    def look(self) -> list[Path]:
        """The files that have not changed since the last look, or for two looks' time, and that are not done."""
        now, before, ready = time.monotonic(), self.seen, []
        self.seen = {}
        for entry in (entry for each in self.folders for entry in _files(each)):
            path, signature = Path(entry.path), _signature(entry)
            seen = before.get(path)
            settled = seen is not None and seen.signature == signature
            if seen is None or not settled:
                is_done = self.modified.get(readable(path.relative_to(self.base).as_posix())) == signature[0]
                seen, settled = Seen(signature, now, is_done), time.time() - signature[0] / 1e9 > 2 * POLL
            self.seen[path] = seen
            if settled and not seen.done:
                ready.append(path)
        return ready

    def is_overdue(self, path: Path) -> bool:
        """Whether it has been unchanged for so long that it will not become readable."""
        return time.monotonic() - self.seen[path].since >= PATIENCE


def watch(predictor: Predictor, folders: Sequence[Path], about: dict[str, object]) -> None:
    """Score the images below the folders, and new ones as they arrive, until Ctrl-C or SIGTERM.

    An image is scored once its size and its time of change have stayed the same between two looks. One that can't be
    decoded is tried again and reported after PATIENCE. A file that was changed after it was scored is scored again.
    Each row of scores.csv is complete when it is written; its column `modified` tells the next start what is scored.

    Args:
        about: what the folder is watched with, which must be the same at the next start.
    """
    output = predictor.output
    _refuse_other(output / folder.WATCH, about)
    with contextlib.closing(GrowingTable(output / folder.SCORES)) as table:
        predictor.report.rows |= table.rows
        arrivals = Arrivals(folders, predictor.base, table.modified)
        left_out: list[str] = []
        written, is_new = time.monotonic(), False
        print(f"watching {', '.join(map(str, folders))}; Ctrl-C ends it", flush=True)
        with signals.as_request() as end:
            while not end.made:
                is_new |= _round(predictor, arrivals, table, left_out, end)
                if is_new and time.monotonic() - written >= REFRESH and not end.made:
                    predictor.report.write(output, left_out)
                    written, is_new = time.monotonic(), False
                until = time.monotonic() + POLL
                while not end.made and (left := until - time.monotonic()) > 0:
                    time.sleep(min(left, 0.1))
            predictor.report.write(output, left_out)
    print(f"{len(table.modified)} images scored, {len(left_out)} left out; {output}/ holds the results", flush=True)


def _round(
    predictor: Predictor, arrivals: Arrivals, table: GrowingTable, left_out: list[str], end: signals.Request
) -> bool:
    """Score what has arrived; whether there was anything new."""
    ready, before = arrivals.look(), len(left_out)
    images = [path for path in ready if path.suffix.lower() in IMAGE_SUFFIXES][:MOST]
    others = [path for path in ready if path.suffix.lower() not in IMAGE_SUFFIXES]
    messages: list[str] = []
    count = 0
    for found in predictor.scored(images, quiet=True) if images else ():
        if isinstance(found, str):
            messages.append(found)
        else:
            (path, prediction), seen = found, arrivals.seen[found[0]]
            table.add(prediction, seen.signature[0])
            seen.done, count = True, count + 1
            ratio = "" if prediction.ratio is None else f"{prediction.ratio:.2f} x threshold, "
            print(f"{prediction.name}: {ratio}{prediction.decision}", flush=True)
        if end.made:
            break
    for path in (*images, *others):
        seen = arrivals.seen[path]
        if end.made or seen.done or not arrivals.is_overdue(path):
            continue
        seen.done = True
        if path not in others:
            left_out += [text for text in messages if text.startswith(f"{path}: ")]
        else:
            left_out += [f"{name}: {text}" for name, text in classified([path]).unread.items()]
    pages, notes = predictor.remarks()
    left_out += pages
    for text in left_out[before:]:
        print(f"left out: {text}", file=sys.stderr, flush=True)
    for note in notes:
        print(f"note: {note}", flush=True)
    return bool(count or left_out[before:])


def _refuse_other(file: Path, about: dict[str, object]) -> None:
    """Write what the folder is watched with, or raise UserError if it differs from what the file says."""
    if not file.exists():
        if (file.parent / folder.SCORES).exists():
            raise UserError(f"{file.parent / folder.SCORES} exists already: choose another output=DIR")
        write_text(file, json.dumps(about, indent=1) + "\n")
        return
    try:
        stored = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not readable ({error}); choose another output=DIR") from error
    for key, value in about.items():
        if stored.get(key) != value:
            raise UserError(
                f"{key}={value}: {file.parent} is watched with {stored.get(key)}; choose another output=DIR"
            )


def _files(place: Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """The files in a folder and below it, sorted, without those that are nobody's; see `data.image_folders`."""
    real = os.path.realpath(place)
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name) if real not in above else []
    except OSError:  # a folder that was removed, or a network drive that will come back
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), (*above, real))
        else:
            yield entry


def _signature(entry: os.DirEntry[str]) -> Signature:
    try:
        status = entry.stat()
    except OSError:  # a link to a file that is missing
        return (0, 0)
    return status.st_mtime_ns, status.st_size
