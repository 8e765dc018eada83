"""The nearest row of a bank for many patches, exact up to the rounding of matrix products in float32."""

import torch
from torch import Tensor

from anomalib_lite.methods.screening import Screen, screen_of

PRODUCTS = ((256, 2048), (16384, 4096))  # patches × rows compared at once: a CPU likes its cache, a GPU large products
BOUNDS = 2**26  # the most bounds of pairs that a CPU holds at once


class Bank:
    """The rows float32 [N, D] of a bank, the images they belong to (`owners` [N]), and what searches need of them."""

    def __init__(self, rows: Tensor, owners: Tensor):
        self.rows, self.owners = rows, owners
        self.size = rows.square().sum(1)
        #: whether all rows belong to one image: then none may be left out
        self.one_owner = bool((owners == owners[:1]).all())
        self.screen = screen_of(rows)

    def nearest(self, x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distance [B, M] of patches [B, M, D] to the nearest row, and its index [B, M]. A GPU waits for nothing.

        The rows of image own[i] are left out for the patches of x[i], unless no row would remain.
        """
        own = None if self.one_owner else own
        index = self.compared(x, own) if self.screen is None else self.screened(self.screen, x, own)
        return torch.linalg.vector_norm(x - self.rows[index], dim=2), index

    def compared(self, x: Tensor, own: Tensor | None) -> Tensor:
        """Indices [B, M] of the nearest rows, found by comparing all."""
        patches, part = PRODUCTS[x.is_cuda]
        parts = x.flatten(0, 1).split(patches)
        if own is None:
            found = [nearest_in_parts(some, self.rows, self.size, part) for some in parts]
        else:
            owned = own.repeat_interleave(x.shape[1]).split(patches)
            found = [
                nearest_in_parts(some, self.rows, self.size, part, self.owners, mine)
                for some, mine in zip(parts, owned, strict=True)
            ]
        return torch.cat(found).view(x.shape[:2])

    def screened(self, screen: Screen, x: Tensor, own: Tensor | None) -> Tensor:
        """Indices [B, M] of the nearest rows, found by comparing those that the screen leaves."""
        patches = min(x.shape[1], PRODUCTS[False][0], max(16, BOUNDS // len(self.rows)))
        bounds, index = screen.buffer(patches), torch.empty(x.shape[:2], dtype=torch.long)
        for i, image in enumerate(x):
            excluded = None if own is None else (self.owners == own[i]).nonzero().squeeze(1)
            for start in range(0, len(image), patches):
                some = image[start : start + patches]
                found = screen.nearest(some, excluded, bounds[:, : len(some)])
                if found is None:
                    found = self.compared(some[None], None if own is None else own[i : i + 1])[0]
                index[i, start : start + patches] = found
        return index


def nearest_in_parts(
    x: Tensor, bank: Tensor, size: Tensor, part: int = 4096, owners: Tensor | None = None, own: Tensor | None = None
) -> Tensor:
    """The nearest row's index [M] for patches [M, D], by matrix products with parts of the bank [N, D].

    An exported graph takes any M.

    Args:
        size: ‖y‖² of the bank's rows [N].
        owners, own: the bank's rows of image own[i] are left out for patch i, [N] and [M].
    """
    best, index = x.new_full(x.shape[:1], torch.inf), torch.zeros(x.shape[:1], dtype=torch.long, device=x.device)
    for start in range(0, len(bank), part):
        rows = slice(start, start + part)
        squares = torch.addmm(size[rows], x, bank[rows].T, alpha=-2)  # less ‖x‖², which is the same for all rows
        if owners is not None and own is not None:
            squares.masked_fill_(owners[rows] == own[:, None], torch.inf)
        least = squares.min(1)
        index = torch.where(least.values < best, least.indices + start, index)
        best = torch.minimum(best, least.values)
    return index
