"""Which of the training images a run may use: all, a few per class, a long tail of classes, or those of a file.

A split is a function DataSet -> Split. The test set stays whole. In a long tail, one category alone is always full.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.data import split_files
from anomalib_lite.data.samples import DataSet, Sample
from anomalib_lite.errors import UserError

PROFILES = ("exp", "step")
SHOTS = "shots"  # the profile of `few_shots`
DRAW = 100  # stream of random numbers; those of `dataset` begin at 0
Counts = dict[str, int]  # images per class


@dataclass(frozen=True)
class Split:
    """The training images of a run. `head` and `tail` name the classes in order; both are empty without a long tail.

    `full` holds each class's number of training images before the split.
    """

    train: list[Sample]
    full: Counts
    profile: str = "full"
    head: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        return count(self.train, self.full)

    def summary_lines(self, name: str) -> list[str]:
        """What the log reports before training starts: the numbers of images, unless all are there, and the notes."""
        if self.profile == "full":
            return self.notes
        groups = {"head ": self.head, "tail ": self.tail} if self.head else {"": list(self.full)}
        listed = "; ".join(g + ", ".join(f"{c} {self.counts[c]}" for c in names) for g, names in groups.items())
        return [f"split {name}: {len(self.train)} of {sum(self.full.values())} training images; {listed}", *self.notes]

    def describe(self) -> dict[str, Any]:
        """The result's entries about the split."""
        kinds = {"profile": self.profile, "head": self.head, "tail": self.tail}
        return kinds | {"counts": self.counts, "full_counts": self.full}


def full(data: DataSet) -> Split:
    """All training images."""
    return Split(data.train, count(data.train))


def long_tail(
    data: DataSet, profile: str, imbalance: float, order: str | Sequence[str] = "size", seed: int = 0
) -> Split:
    """As many images of each class as `class_counts` says, drawn by `draw`: a smaller imbalance keeps a superset of a
    larger one.
    """
    full_counts = count(data.train)
    counts = class_counts(full_counts, profile, imbalance, order)
    if len(counts) == 1:
        return full(data)
    notes = [f"{name}: a single training image" for name, number in counts.items() if number == 1]
    return Split(draw(data.train, counts, seed), full_counts, profile, *head_and_tail(list(counts)), notes)


def few_shots(data: DataSet, shots: int, seed: int = 0) -> Split:
    """`shots` images of each class, drawn by `draw`: more shots keep a superset of fewer shots.

    Raises UserError if a class has fewer images.
    """
    full_counts = count(data.train)
    fewest = min(full_counts, key=full_counts.__getitem__, default="")
    if fewest and full_counts[fewest] < shots:
        few = full_counts[fewest]
        raise UserError(f"split.shots={shots}: '{fewest}' has only {few} training images; give at most {few}")
    return Split(draw(data.train, dict.fromkeys(full_counts, shots), seed), full_counts, SHOTS)


def draw(samples: list[Sample], counts: Counts, seed: int) -> list[Sample]:
    """So many samples of each class, in their order: the first ones of a seeded shuffle of the class's sorted files.

    A class's shuffle depends on `seed` and the class's name alone: a larger number keeps a superset of a smaller one,
    whatever other classes there are.
    """
    drawn: set[Path] = set()
    for category, number in counts.items():
        files = sorted((s.path for s in samples if s.category == category), key=Path.as_posix)
        shuffled = np.random.default_rng([seed, DRAW, *category.encode()]).permutation(len(files))
        drawn |= {files[i] for i in shuffled[:number]}
    return [s for s in samples if s.path in drawn]


def from_file(
    data: DataSet,
    path: str | Path | None,
    format: str = "auto",
    order: str | Sequence[str] = "size",
    head: int | None = None,
    anomalous: bool = False,
) -> Split:
    """The training images that a file lists, or all others (`format` prune); see `split_formats`.

    Args:
        order: of the classes, by their number of images in this split. head: how many of them are the head.
        anomalous: admit defective images among the entries; otherwise they are a UserError.
    """
    if not path:
        raise UserError("split.path is not set: give the file of the split, as in split=file split.path=FILE")
    file = Path(path).expanduser()
    entries, found = split_files.read(file, format)
    train, lines, others = split_files.select(data, file, entries, prune=found == "prune", anomalous=anomalous)
    full_counts = count(data.train)
    counts = count(train, full_counts)
    names = ordered(counts, order)
    if head is not None and not 0 < head < len(names) and len(names) > 1:
        raise UserError(f"split.head={head}: give a number of classes from 1 to {len(names) - 1}, or null for half")
    notes = [f"{name}: a single training image ({lines[name]})" for name, number in counts.items() if number == 1]
    if others:
        first = f"{others[0].where}: {others[0].path}"
        notes.append(f"{file.name}: {len(others)} entries are of classes that this run does not have (first: {first})")
    if defects := sum(s.label for s in train):
        tested = {s.path for s in data.test}
        shared = sum(s.path in tested for s in train)
        text = f"{file.name}: {defects} of {len(train)} training images are defective (split.anomalous=true)"
        notes.append(f"{text}; images that are test images too: {shared}" if shared else text)
    if len(names) == 1:
        return Split(train, full_counts, "file", notes=notes)
    head_names, tail_names = head_and_tail(names, head)
    last, first = head_names[-1], tail_names[0]
    if counts[last] == counts[first] and order == "size":
        both = f"'{last}' (head) and '{first}' (tail) have {counts[first]} training images each"
        notes.append(f"{both}; split.head=N sets how many classes are the head")
    return Split(train, full_counts, "file", head_names, tail_names, notes)


def class_counts(full: Counts, profile: str, imbalance: float, order: str | Sequence[str] = "size") -> Counts:
    """Images per class of a long tail, in the classes' order (LDAM, arXiv 1906.07413; LTAD).

    With position i of C classes, N the largest full count: exp keeps N · imbalance^(-i / (C - 1)) images, step all of
    the head's and N / imbalance of the tail's; rounded down, at least 1, at most the class's full count.
    """
    if profile not in PROFILES:
        raise UserError(f"split.profile={profile}: choose {' or '.join(PROFILES)}")
    names = ordered(full, order)
    if len(names) == 1:
        return dict(full)
    largest, head = max(full.values()), head_and_tail(names)[0]
    counts = {}
    for i, name in enumerate(names):
        number = largest * imbalance ** (-i / (len(names) - 1)) if profile == "exp" else largest / imbalance
        rounded = max(1, int(number + 1e-9))  # an exact power may come out a rounding error below a whole number
        counts[name] = full[name] if profile == "step" and name in head else min(full[name], rounded)
    return counts


def ordered(counts: Counts, order: str | Sequence[str]) -> list[str]:
    """The classes by `size` (largest first, ties by name), by `name`, either in `reverse`, or as a list has them."""
    by_size = sorted(counts, key=lambda name: (-counts[name], name))
    ways = {"size": by_size, "reverse": by_size[::-1], "name": sorted(counts), "reverse_name": sorted(counts)[::-1]}
    if isinstance(order, str):
        if order not in ways:
            raise UserError(f"split.order={order}: choose {', '.join(ways)}, or give a list of all categories")
        return ways[order]
    names = [str(name) for name in order]
    wrong = (
        [f"'{name}' is no category of this run" for name in names if name not in counts]
        + [f"'{name}' is listed {names.count(name)} times" for name in names if names.count(name) > 1]
        + [f"'{name}' is missing" for name in counts if name not in names]
    )
    if wrong:
        raise UserError(f"split.order: {wrong[0]}; name each of these once: {', '.join(by_size)}")
    return names


def head_and_tail(names: list[str], head: int | None = None) -> tuple[list[str], list[str]]:
    """Head and tail: the first half of the ordered classes, rounded up (or `head` of them), and the rest."""
    head = -(-len(names) // 2) if head is None else head
    return names[:head], names[head:]


def count(samples: list[Sample], names: Sequence[str] | Counts = ()) -> Counts:
    """Images per class; classes in the order of `names`, then of the samples."""
    counts = dict.fromkeys(names, 0)
    for sample in samples:
        counts[sample.category] = counts.get(sample.category, 0) + 1
    return counts
