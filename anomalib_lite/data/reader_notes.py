"""Notes about a data set that was read: numbers of images, what is not used, and what can't be measured."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from anomalib_lite.data.image_folders import holds_images, listing, walk
from anomalib_lite.data.samples import DataSet, Sample

KINDS = ("train", "good test", "defective test")
Counts = Mapping[str, tuple[int, int, int]]  # per category: the official numbers of images of these kinds


def unread_notes(base: Path, read: Iterable[Path], why: str) -> list[str]:
    """A note on images in the folder of the data set, or in folders of it, that are in none of the folders `read`."""
    found = listing(base)
    read = set(read)
    if base in read:
        return []
    passed = [path.name for path in found.folders if path not in read and holds_images(path)]
    notes = [f"{len(passed)} folders with images are not read, {why}: {', '.join(passed[:5])}"] if passed else []
    loose = [*found.images, *found.unread]
    if loose:
        notes.append(f"{len(loose)} files beside the categories are not read (first: {loose[0]})")
    return notes


def passed_notes(passed: Sequence[Path], category: str = "") -> list[str]:
    """A note on files and folders that a reader has passed over."""
    whose = f"{category}: " if category else ""
    return [f"{whose}{len(passed)} files or folders are not used (first: {passed[0]})"] if passed else []


def unused_notes(folders: Iterable[Path], unused: Mapping[str, str]) -> list[str]:
    """A note on each of the folders that every category has and no reader uses, by name, with the reason."""
    notes, folders = [], list(folders)
    for name, why in unused.items():
        if count := sum(len(walk(folder / name).images) for folder in folders):
            notes.append(f"{count} images in {name} are not used: {why}")
    return notes


def missing_notes(train_samples: Iterable[Sample], test_samples: Sequence[Sample]) -> list[str]:
    """Notes on what can't be measured with the test images at hand."""
    notes = []
    for category in dict.fromkeys(s.category for s in train_samples):
        test = [s for s in test_samples if s.category == category]
        if not test:
            notes.append(f"{category}: no test images, nothing can be measured")
        elif all(s.label for s in test):
            notes.append(f"{category}: no good test images, image AUROC can't be computed")
        if any(s.label for s in test) and not any(s.mask for s in test):
            notes.append(f"{category}: no ground_truth, pixel metrics are left out")
    return notes


def count_notes(data: DataSet, official: Counts) -> list[str]:
    """Notes on categories whose numbers of images differ from the official ones."""
    notes = []
    for category in dict.fromkeys(s.category for s in data.train):
        labels = [s.label for s in data.test if s.category == category]
        counts = (sum(s.category == category for s in data.train), labels.count(0), labels.count(1))
        notes += total_notes(category, dict(zip(KINDS, counts, strict=True)), official[category])
    return notes


def total_notes(name: str, counts: Mapping[str, int], official: Iterable[int]) -> list[str]:
    """A note if the numbers of images of each kind differ from the official ones, which come in the same order."""
    differing = [
        f"{number} {kind} images, officially {right}"
        for (kind, number), right in zip(counts.items(), official, strict=True)
        if number != right
    ]
    return [f"{name}: {'; '.join(differing)}"] if differing else []


def absent_notes(data: DataSet, official: Collection[str], title: str) -> list[str]:
    """A note on the official categories that are not on disk, if there are any."""
    absent = sorted(set(official) - {s.category for s in data.train})
    listed = f"{len(absent)} of {title}'s {len(official)} categories are not on disk: {', '.join(absent)}"
    return [listed] if absent else []
