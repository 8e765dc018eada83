"""A frozen backbone's features of unaugmented images: computed once, and kept in files that runs share.

A run asks for the features of its images. Those that an earlier run, another seed, method or job of a sweep has left
are mapped from disk; the others are computed and appended. Everything they depend on is in the key.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from torch import Tensor

from anomalib_lite.data.transforms import Pipeline
from anomalib_lite.features.backbones import Backbone

log = logging.getLogger(__name__)

VERSION = 2  # raise it whenever a file's layout or a feature's computation changes: it is part of the key
BATCH = 16  # images a forward pass, always: with another number a network's output may differ in its last bit
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class FeatureStore:
    """Features by image path. A table [N, Σ H_i·W_i·C_i] has an image a row, its levels one after the other, channels
    last; it lies in memory or is mapped from a file."""

    def __init__(self, shapes: Sequence[Sequence[int]] = ()):
        self.shapes = [tuple(shape) for shape in shapes]  # (H_i, W_i, C_i)
        self.rows: dict[str, Tensor] = {}

    def holds(self, paths: Iterable[str]) -> bool:
        return all(path in self.rows for path in paths)

    def get(self, paths: Sequence[str]) -> list[Tensor]:
        """Of these images, list of float32 [B, C_i, H_i, W_i] in channels-last memory; KeyError if one is not held."""
        first = self.rows[paths[0]]
        rows = torch.empty(len(paths), len(first), dtype=first.dtype)
        for row, path in zip(rows, paths, strict=True):
            row.copy_(self.rows[path])  # not stack, which autocast takes for its own
        levels, at = [], 0
        for shape in self.shapes:
            level = rows[:, at : at + row_size(shape)].view(-1, *shape).float()
            levels.append(level.contiguous().movedim(-1, 1))
            at += row_size(shape)
        return levels

    def add(self, paths: Sequence[str], table: Tensor) -> None:
        self.rows.update(zip(paths, table, strict=True))


def row_size(shape: Sequence[int]) -> int:
    return shape[0] * shape[1] * shape[2]


def shapes(levels: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """(H_i, W_i, C_i) of levels [B, C_i, H_i, W_i]."""
    return [tuple(level.movedim(1, -1).shape[1:]) for level in levels]


def table(levels: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Levels [B, C_i, H_i, W_i] as rows [B, Σ H_i·W_i·C_i] on the CPU."""
    return torch.cat([level.movedim(1, -1).flatten(1).to(dtype) for level in levels], 1).cpu()


def raw(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data


def compact(levels: Sequence[Tensor]) -> torch.dtype:
    """The smallest type that holds these numbers exactly: bfloat16 where the backbone has computed in it."""
    exact = all(torch.equal(level, level.bfloat16().float()) for level in levels)
    return torch.bfloat16 if exact else torch.float32


def key(backbone: Backbone, pipeline: Pipeline, device: torch.device, kind: str) -> dict[str, Any]:
    """Everything but the image that its features depend on, to the last bit; plain Python.

    Raises TypeError or NotImplementedError where a transform can't be described.
    """
    weights = hashlib.sha256()
    for name, tensor in backbone.net.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "version": VERSION,
        "backbone": backbone.name,
        "layers": backbone.layers,
        "weights": weights.hexdigest(),
        "pipeline": pipeline.description(),
        "bf16": backbone.low_precision(device),
        "type": kind,
        "computed": [f"torch {torch.__version__}", f"timm {timm.__version__}", on]
        + ([] if device.type == "cuda" else [f"{torch.get_num_threads()} threads"]),
    }


def image_key(path: str | Path) -> str:
    """A file by its place, size and time of change."""
    stat = Path(path).stat()
    return hashlib.sha256(f"{Path(path).absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:24]


class FeatureFiles:
    """The files below one folder that share a key. Every `NAME.json` (its images, a row each, and the rows' CRC-32)
    stands for a complete `NAME.features`: it is written last, so what a killed writer leaves behind is without one.

    Every method may raise OSError: no disk space, no permission.
    """

    def __init__(self, root: Path, key: dict[str, Any]):
        text = json.dumps(key, sort_keys=True)
        self.root = root
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.txt").is_file():
            (self.folder / "key.txt").write_text(text)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; the system gives the lock back for a process that was killed."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another run that computes features with the same backbone")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def load(self, keys: dict[str, str]) -> FeatureStore:
        """What the files hold of these images (path -> image key), mapped; damaged files count as absent."""
        store, paths = FeatureStore(), {key: path for path, key in keys.items()}
        for index in sorted(self.folder.glob("*.json")):
            try:
                content = json.loads(index.read_text())
                wanted = [(paths[key], row) for row, key in enumerate(content["images"]) if key in paths]
                if wanted:
                    file, dtype = index.with_suffix(".features"), TYPES[content["type"]]
                    size = sum(map(row_size, content["shapes"]))
                    if file.stat().st_size != len(content["images"]) * size * dtype.itemsize:
                        raise ValueError("truncated")
                    # private, so that it needs no right to write; nothing is written, so it stays the file's memory
                    count = len(content["images"])
                    rows = torch.from_file(str(file), shared=False, size=count * size, dtype=dtype).view(count, size)
                    if any(zlib.crc32(raw(rows[row])) != content["sums"][row] for _, row in wanted):
                        raise ValueError("not what was written")  # a disk that lost blocks leaves the length
                    store.shapes = [tuple(shape) for shape in content["shapes"]]
                    store.rows.update((path, rows[row]) for path, row in wanted)
                    os.utime(file)  # used last now
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                log.warning("%s: damaged (%s); its features are computed again", index, str(error).splitlines()[0])
                with contextlib.suppress(OSError):
                    index.unlink()
        return store

    def sweep(self) -> None:
        """Remove what killed writers left behind; only under the lock."""
        for file in self.folder.glob("*.features"):
            if not file.with_suffix(".json").is_file():
                file.unlink()

    def make_room(self, size: int, limit: float) -> None:
        """Delete the files that were used longest ago until `size` bytes fit into `limit`; OSError if they never do."""
        if size > limit:
            raise OSError(f"{size / 2**30:.2f} GB are needed, cache.limit_gb allows {limit / 2**30:.2f}")
        files = []
        for file in self.root.glob("*/*.features"):
            with contextlib.suppress(OSError):
                files.append((file.stat().st_mtime, file.stat().st_size, file))
        total = sum(each[1] for each in files)
        for _, bytes_, file in sorted(files):
            if total + size <= limit:
                return
            with contextlib.suppress(OSError):  # a run that has it mapped keeps it until it ends
                file.with_suffix(".json").unlink(missing_ok=True)
                file.unlink()
            total -= bytes_

    @contextlib.contextmanager
    def writer(self) -> Iterator["Writer"]:
        """Append rows to a new file, which counts once this ends without an exception."""
        file = self.folder / f"{uuid.uuid4().hex}.features"
        try:
            with file.open("wb") as stream:
                writer = Writer(stream)
                yield writer
                stream.flush()
                os.fsync(stream.fileno())
            if not writer.images:
                file.unlink()
                return
            part = file.with_suffix(".part")
            kind = next(name for name, dtype in TYPES.items() if dtype == writer.dtype)
            index = {"type": kind, "shapes": writer.shapes, "images": writer.images, "sums": writer.sums}
            part.write_text(json.dumps(index))
            part.replace(file.with_suffix(".json"))
        except BaseException:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            raise


class Writer:
    """Rows of one file; all of one type, which `reserve` fixes."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.images, self.sums = stream, list[str](), list[int]()
        self.shapes: list[tuple[int, ...]] = []
        self.dtype = torch.float32

    def reserve(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int) -> None:
        """Claim the disk space of `count` images at once: a full disk shows before anything is computed."""
        self.shapes, self.dtype = shapes, dtype
        size = count * sum(map(row_size, shapes)) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.stream.fileno(), 0, size)

    def add(self, keys: Sequence[str], levels: Sequence[Tensor]) -> None:
        rows = table([level[: len(keys)] for level in levels], self.dtype)
        self.stream.write(raw(rows))
        self.images.extend(keys)
        self.sums.extend(zlib.crc32(raw(row)) for row in rows)
