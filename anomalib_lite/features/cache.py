"""Feature files: runs share a frozen backbone's features of unaugmented images.

Features that an earlier run, seed, method or job of a sweep has stored are mapped from disk; the others are computed
and added. The key of a folder of files contains everything that the features depend on.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalib_lite.data.cores import threads
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.paths import replacing

log = logging.getLogger(__name__)

VERSION = 5  # Raise this number when the files' layout or the computation of features changes: the key contains it.
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHUNK_IMAGES, CHUNK_BYTES = 1000, 2**28  # Limits of a file's size: a killed extraction loses at most one file.
FILES, PARTS = "*.safetensors", "*.part.safetensors"  # PARTS are still being written
IN_USE = 48 * 3600  # seconds after its last use in which a file on a network file system is not deleted
NETWORK = re.compile(r"nfs4?|cifs|smb3|lustre|gpfs|beegfs|ceph|afs|9p|fuse\.(sshfs|glusterfs)")
GPU_BATCH = 64  # images of every forward pass on a GPU


def key(backbone: Backbone, pipeline: Pipeline, device: torch.device, dtype: str, keeps: str = "") -> dict[str, Any]:
    """Everything that features depend on to the last bit, except the image, as plain Python values.

    `keeps` says what a method keeps of the backbone's outputs; it is empty if the method keeps them as they are.

    Raises:
        TypeError, NotImplementedError: a transform has no description.
    """
    weights = hashlib.sha256()
    for name, tensor in backbone.net.state_dict().items():
        weights.update(name.encode())
        weights.update(_bytes(tensor.cpu().contiguous().flatten()))
    # Keys of what earlier versions could not store. They are absent elsewhere, so that earlier files stay valid.
    later = {
        "turned": any(getattr(backbone, "channels_last", ())),
        "norm": backbone.norm,
        "tokens": backbone.tokens,
        "keeps": f"{keeps} in bf16" if keeps and backbone.low_precision(device) else keeps,
        "batch": GPU_BATCH if device.type == "cuda" else None,
    }
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "version": VERSION,
        "backbone": backbone.name,
        "layers": backbone.layers,
        "weights": weights.hexdigest(),
        "pipeline": pipeline.description(),
        "bf16": backbone.low_precision(device),
        **{name: value for name, value in later.items() if value},
        **({"float32": "ieee"} if device.type == "cuda" else {}),  # not TF32, whatever a method trains in
        "type": dtype,
        "computed": [f"torch {torch.__version__}", f"timm {timm.__version__}", on]
        + ([] if device.type == "cuda" else [f"{torch.get_num_threads()} threads"]),
    }


def image_key(path: str | Path) -> str:
    """The hash that identifies an image file: of its absolute path, its size and the time of its last change."""
    stat = Path(path).stat()
    text = f"{Path(path).absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def checksum(row: Tensor) -> int:
    return zlib.crc32(_bytes(row))


def on_network(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a network file system holds the folder. False where the system does not say so, as on macOS."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    kinds = {place.replace("\\040", " "): kind for _, place, kind, *_ in map(str.split, lines)}
    folder = folder.resolve()
    return (
        NETWORK.fullmatch(next((kinds[str(at)] for at in (folder, *folder.parents) if str(at) in kinds), ""))
        is not None
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


class FeatureFiles:
    """The feature files below `root` that share a key; each file has up to CHUNK_IMAGES rows.

    A file is written under another name and then renamed, so it is complete or absent. Its metadata has the key of the
    image of every row, and a CRC-32 of every row, because lost disk blocks do not change a file's length.

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
        """A lock, for which it waits: one run writes at a time. It ends with a killed process.

        Processes forked from this one, such as those that load data, do not inherit it.

        The incomplete files of killed writers are removed first.
        """
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another run that computes features with the same backbone")
                fcntl.lockf(file, fcntl.LOCK_EX)  # a signal whose handler raises an exception ends the wait
            for part in [*self.folder.glob(PARTS), *self.folder.glob(".tmp??????")]:  # the latter of safetensors
                part.unlink()
            yield

    def load(self, keys: dict[str, str], stored: StoredFeatures) -> None:
        """Add the stored features of these images (path -> image key) to `stored`, mapped from disk, if it lacks them.

        A damaged file is reported and removed: its features are computed again.
        """
        paths = {image: path for path, image in keys.items() if path not in stored.places}
        for file in sorted({*self.folder.glob(FILES)} - {*self.folder.glob(PARTS)}):
            try:
                with safe_open(file, "pt") as opened:
                    about = json.loads(opened.metadata()["about"])
                    wanted = [(paths[image], row) for row, image in enumerate(about["images"]) if image in paths]
                    if not wanted:
                        continue
                    table = opened.get_tensor("features")
                with ThreadPoolExecutor(threads()) as pool:
                    found = list(pool.map(checksum, [table[row] for _, row in wanted]))
                if found != [about["checksums"][row] for _, row in wanted]:
                    raise ValueError("a checksum of its content is wrong")
                stored.shapes = [tuple(shape) for shape in about["shapes"]]
                stored.add(table, dict(wanted))
                with contextlib.suppress(OSError):  # no permission, or a read-only file system
                    os.utime(file)  # marks the time of its last use for make_room
            except FileNotFoundError:  # another run has deleted the file to make room
                continue
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                log.warning("%s: damaged (%s); its features are computed again", file, str(error).splitlines()[0])
                with contextlib.suppress(OSError):
                    file.unlink()

    def make_room(self, size: int, limit: float) -> None:
        """Delete the least recently used files until `size` more bytes fit into `limit`.

        Only folders with a key.txt hold feature files: another folder below the root may be the user's.

        Raises:
            OSError: `size` exceeds `limit` or the free disk space; or on a network file system too many files were used
                lately, so that runs of other nodes would crash. The error comes before any feature is computed.
        """
        if size > limit:
            raise OSError(f"{size / 2**30:.2f} GB are needed, but cache.limit_gb allows {limit / 2**30:.2f}")
        files = []
        for folder in (file.parent for file in self.root.glob("*/key.txt")):
            for file in [*folder.glob(FILES), *folder.glob("*.features")]:  # the latter of old versions
                with contextlib.suppress(OSError):
                    files.append((file.stat().st_mtime, file.stat().st_size, file))
        too_much = sum(bytes_ for _, bytes_, _ in files) + size - limit
        if on_network(self.root):
            files = [found for found in files if found[0] < time.time() - IN_USE]
            if sum(bytes_ for _, bytes_, _ in files) < too_much:
                raise OSError(
                    f"{size / 2**30:.2f} GB more exceed cache.limit_gb, and the files that were used within "
                    f"{IN_USE // 3600} hours stay: on a network file system a run of another node may still read them"
                )
        for _, bytes_, file in sorted(files):
            if too_much <= 0:
                break
            with contextlib.suppress(OSError):  # on a local disk, a run that has mapped the file can still read it
                file.unlink()
            too_much -= bytes_
        if size > (free := shutil.disk_usage(self.folder).free):
            raise OSError(f"{size / 2**30:.2f} GB are needed, but only {free / 2**30:.2f} are free in {self.root}")

    def write(self, images: Sequence[str], rows: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        """Write a new file: rows [N, Σ H_i·W_i·C_i], one for each of these N image keys."""
        checksums = [checksum(row) for row in rows]
        about = json.dumps({"images": list(images), "shapes": list(shapes), "checksums": checksums})
        with replacing(self.folder / f"{uuid.uuid4().hex}.safetensors") as part:
            try:
                save_file({"features": rows}, part, {"about": about})
                shutil.copymode(self.folder / "key.txt", part)  # safetensors lets nobody but the owner read a file
            except SafetensorError as error:
                part.unlink(missing_ok=True)
                raise OSError(str(error)) from error
