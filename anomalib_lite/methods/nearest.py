"""The nearest row of a bank for many patches, exact up to the rounding of matrix products in float32."""

import torch
from torch import Tensor

PRODUCTS = ((256, 2048), (16384, 4096))  # patches × rows compared at once: a CPU likes its cache, a GPU large products


class Bank:
    """The rows float32 [N, D] of a bank, the images they belong to (`owners` [N]), and what searches need of them."""

    def __init__(self, rows: Tensor, owners: Tensor):
        self.rows, self.owners = rows, owners
        self.size = rows.square().sum(1)
        #: whether all rows belong to one image: then none may be left out
        self.one_owner = bool((owners == owners[:1]).all())

    def nearest(self, x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distance [B, M] of patches [B, M, D] to the nearest row, and that row's index [B, M]. Nothing waits.

        The rows of image own[i] are left out for the patches of x[i], unless no row would remain.
        """
        patches, part = PRODUCTS[x.is_cuda]
        parts = x.flatten(0, 1).split(patches)
        if own is None or self.one_owner:
            found = [nearest_in_parts(some, self.rows, self.size, part) for some in parts]
        else:
            owned = own.repeat_interleave(x.shape[1]).split(patches)
            found = [
                nearest_in_parts(some, self.rows, self.size, part, self.owners, mine)
                for some, mine in zip(parts, owned, strict=True)
            ]
        index = torch.cat(found).view(x.shape[:2])
        return torch.linalg.vector_norm(x - self.rows[index], dim=2), index


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
