"""Small trees of CIFAR-10: torchvision's batches, and images in {train,test}/CLASS. Each gives its root."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.data.cifar10 import BATCHES, CLASSES, FILES

TRAIN, TEST = 10, 2  # images of each class


def save_pickle(file: Path, content: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return file


def make_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The batches, whose checksums torchvision then expects; {batch: its images uint8 [N, 32, 32, 3]}.

    Every batch has its classes in turn; those of one class have about one colour.
    """
    from torchvision.datasets import CIFAR10

    rng, images = np.random.default_rng(0), {}
    files = [save_pickle(root / BATCHES / FILES[-1], {"label_names": list(CLASSES)})]
    for name in FILES[:-1]:
        labels = np.arange(10).repeat(TEST)
        rng.shuffle(labels)
        images[name] = rng.integers(0, 120, (len(labels), 32, 32, 3), np.uint8) + labels[:, None, None, None] * 13
        images[name] = images[name].astype(np.uint8)
        rows = images[name].transpose(0, 3, 1, 2).reshape(len(labels), -1)  # channel after channel, as published
        files.append(save_pickle(root / BATCHES / name, {"data": rows, "labels": labels.tolist()}))
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in files]
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[0][1]})
    monkeypatch.setattr(CIFAR10, "train_list", sums[1:6])
    monkeypatch.setattr(CIFAR10, "test_list", sums[6:])
    return images


def make_folders(root: Path, size: int = 32) -> Path:
    """JPEG files in {train,test}/CLASS."""
    rng = np.random.default_rng(1)
    for number, name in enumerate(CLASSES):
        for part, count in (("train", TRAIN), ("test", TEST)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 120, (size, size, 3), np.uint8) + np.uint8(13 * number)
                Image.fromarray(image).save(root / part / name / f"{i:04}.jpg")
    return root
