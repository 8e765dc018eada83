"""The order in which training asks for images: the same global batches for any number of devices."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from anomalib_lite.data.dataset import BALANCE, SHUFFLE
from anomalib_lite.errors import UserError


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def check_batch_size(batch_size: int, world: int) -> None:
    """Raise UserError unless every one of the `world` devices gets as many images of a batch."""
    if batch_size % world:
        raise UserError(f"data.batch_size={batch_size} is not divisible by {world} devices; use a multiple of {world}")


class TrainBatchSampler(Sampler):
    """This rank's share of each global batch of a seeded permutation, as lists of (epoch, index).

    Global batches are the same for any number of ranks. The last batch of an epoch is short. It is filled up from the
    epoch's beginning as far as every rank needs as many images, or left out with `drop_last` unless it is the only one.

    An iteration begins at `next_batch`, which counts batches from the start of training. The loader moves it on with
    every batch that it hands out, so that a resumed run continues in the middle of an epoch.

    With `classes`, the class of each sample, an epoch draws each of the C classes ceil(length / C) times, so that the
    epoch has about as many batches as without. The epoch is a chain of rounds that hold every class once; a class goes
    through seeded permutations of its samples and continues where the last epoch left off. The first number of a pair
    is then how often the sample has been drawn before: each time it is augmented anew.

    Args:
        length: number of samples. batch_size: over all ranks together. seed: of the permutations.
        first_batch: number of batches that were trained on before.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        first_batch: int = 0,
        classes: Sequence[str] | None = None,
    ):
        check_batch_size(batch_size, world)
        self.members = None if classes is None else _members(classes)
        if self.members:
            length = len(self.members) * -(-length // len(self.members))
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.drop_last = drop_last and length >= batch_size
        self.next_batch = first_batch

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # A generator, so that the position is read with the first batch and not when a loader is made.
        epoch, first = divmod(self.next_batch, len(self))
        order = self._balanced(epoch) if self.members else self._permuted(epoch)
        for number in range(first, len(self)):
            yield self._share(order, number)

    def _permuted(self, epoch: int) -> np.ndarray:
        """(epoch, index) of an epoch, [N, 2]."""
        order = np.random.default_rng([self.seed, SHUFFLE, epoch]).permutation(self.length)
        return np.stack([np.full(self.length, epoch), order], 1)

    def _balanced(self, epoch: int) -> np.ndarray:
        """(times drawn before, index) of an epoch in which all classes are drawn equally often, [N, 2]."""
        assert self.members
        rounds = self.length // len(self.members)
        drawn = []
        for name, indices in self.members.items():
            places = np.arange(epoch * rounds, (epoch + 1) * rounds)
            order = np.empty((rounds, 2), np.int64)
            for turn in np.unique(places // len(indices)):
                rng = np.random.default_rng([self.seed, BALANCE, int(turn), *name.encode()])
                rows = places // len(indices) == turn
                order[rows, 0], order[rows, 1] = turn, rng.permutation(indices)[places[rows] % len(indices)]
            drawn.append(order)
        rng = np.random.default_rng([self.seed, SHUFFLE, epoch])
        within = rng.permuted(np.tile(np.arange(len(drawn)), (rounds, 1)), axis=1)  # one round per row
        return np.stack(drawn)[within, np.arange(rounds)[:, None]].reshape(-1, 2)

    def _share(self, order: np.ndarray, number: int) -> list[tuple[int, int]]:
        batch = order[number * self.batch_size : (number + 1) * self.batch_size]
        batch = np.concatenate([batch, np.resize(order, (-len(batch) % self.world, 2))])
        return [(int(epoch), int(index)) for epoch, index in batch[self.rank :: self.world]]


def _members(classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions of each class's samples."""
    return {name: np.flatnonzero(np.array(classes, object) == name) for name in dict.fromkeys(classes)}
