"""Reader of CIFAR-10 (Krizhevsky, 2009) for one-class classification, whose protocol is one against nine.

One class is normal and has the training images; all test images are tested, and those of the other classes are
abnormal. There are no masks.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from anomalib_lite.data.cores import threads
from anomalib_lite.data.image_folders import check_readable, holds_images, listing
from anomalib_lite.data.mvtec_layout import choose, existing_root
from anomalib_lite.data.reader_notes import count_notes, missing_notes, passed_notes
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError
from anomalib_lite.paths import cache_folder, whole_folder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = 5000, 1000  # official numbers of images of each class
BATCHES = "cifar-10-batches-py"  # torchvision's folder
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
VERSION = 1  # of the unpacked images; it is part of their folder's name
log = logging.getLogger(__name__)


def read_cifar10(root: str | Path | None, category: str | Sequence[str]) -> DataSet:
    """CIFAR-10 as torchvision reads it (cifar-10-batches-py), or as images in {train,test}/CLASS.

    With several classes, all of them are normal, and each is tested against the classes that are not named.

    Raises:
        UserError: the root holds neither, a batch is missing or damaged, the normal class has no training images, or no
            class is left as abnormal.
    """
    base = existing_root(root)
    folder = image_root(base)
    names = choose(category, [name for name in CLASSES if (folder / "train" / name).is_dir()], base, _hint(folder))
    others = [name for name in CLASSES if name not in names]
    if not others:
        raise UserError("data.category: all ten classes are normal, so none is abnormal; name nine classes at most")
    data, passed = DataSet(folder, [], []), list[Path]()
    tested = {name: _images(folder / "test" / name, passed) for name in CLASSES}
    for name in names:
        train = _images(folder / "train" / name, passed)
        if not train:
            raise UserError(f"{folder / 'train' / name}: no training images; put the images of this class there")
        data.train += [Sample(path, name, "good", 0, None) for path in train]
        data.test += [Sample(path, name, "good", 0, None) for path in tested[name]]
        data.test += [Sample(path, name, other, 1, None) for other in others for path in tested[other]]
    data.notes = [
        f"one-class protocol: {', '.join(names)} normal, the test images of the other {len(others)} classes abnormal",
        *missing_notes(data.train, data.test),
        *count_notes(data, dict.fromkeys(names, (TRAIN, TEST, TEST * len(others)))),
    ]
    parts = [folder / part for part in ("train", "test")]
    passed += [path for part in parts for path in listing(part).folders if path.name not in CLASSES]
    data.notes += passed_notes(passed)
    return data


def image_root(base: Path) -> Path:
    """The folder that holds {train,test}/CLASS: the root, or the cache folder with its unpacked batches."""
    if (base / FILES[0]).is_file():
        raise UserError(f"{base}: these are the batches; set data.root to the folder that holds {BATCHES}")
    if (base / BATCHES).is_dir():
        return unpack(base)
    if any(not (base / part).is_dir() for part in ("train", "test")):
        raise UserError(
            f"{base}: neither {BATCHES} nor folders of images (train/CLASS and test/CLASS); set data.root to the "
            "folder that holds one of them"
        )
    return base


def unpacked_root() -> Path:
    """The folder of the unpacked images. torchvision's checksums make sure that they are the same for all roots."""
    return cache_folder() / "cifar10" / f"v{VERSION}"


def unpack(base: Path) -> Path:
    """Unpack torchvision's batches below `base` as PNG files, without loss, unless that was done before.

    An image is called by its position in torchvision's data set: train/cat/00029.png.
    """
    for name in FILES:
        if not (base / BATCHES / name).is_file():
            raise UserError(f"{base / BATCHES / name}: no such file; extract cifar-10-python.tar.gz again")
    root = unpacked_root()
    if root.is_dir():
        return root
    from torchvision.datasets import CIFAR10

    log.info("unpacking CIFAR-10 into %s", root)
    try:
        with whole_folder(root) as draft, ThreadPoolExecutor(threads()) as pool:
            for part in ("train", "test"):
                batches = CIFAR10(base, train=part == "train")
                folders = [draft / part / name for name in batches.classes]
                for folder in folders:
                    folder.mkdir(parents=True)
                files = [folders[target] / f"{i:05}.png" for i, target in enumerate(batches.targets)]
                list(pool.map(lambda file, image: Image.fromarray(image).save(file), files, batches.data))
    except RuntimeError as error:  # of torchvision, for a checksum
        raise UserError(
            f"{base / BATCHES}: the files are not CIFAR-10's ({str(error).split('.')[0]}); extract "
            "cifar-10-python.tar.gz again"
        ) from None
    except OSError as error:
        if not root.is_dir():  # another process was faster
            raise UserError(f"{root}: can't unpack CIFAR-10 ({error.strerror}); set ANOMALIB_LITE_CACHE") from None
    return root


def _hint(folder: Path) -> str:
    return "" if any((folder / "train" / name).is_dir() for name in CLASSES) else "; put images into train/CLASS"


def _images(folder: Path, passed: list[Path]) -> list[Path]:
    """The images of a folder; other files, and folders with images, are added to `passed`."""
    found = listing(folder)
    check_readable(found)
    passed += [*found.others, *(below for below in found.folders if holds_images(below))]
    return found.images
