"""The nearest row of a bank for many patches, exact: a bound in few dimensions rules out nearly all rows.

The bound. Let P be a projection to d orthonormal directions and ρ(x) the norm of what P leaves out of x − m. Then
x → (P(x − m), ρ(x)) brings no two points further apart: ‖x − y‖² ≥ ‖P(x − y)‖² + (ρ(x) − ρ(y))². So the distances of
these d + 1 numbers are lower bounds, and one matrix product gives them. The row with the smallest bound has an exact
distance U. A row whose bound exceeds U can't be the nearest; the distances of all others are computed in full.

Rounding. With u = 2⁻²⁴, a = ‖x − m‖² and b = max ‖y − m‖²: the d + 1 numbers are computed in float64 and stored in
float32, which moves each point by less than 4u of its norm and a bound by 17u · (a + b). The matrix product adds
2 (d + 3) u · (a + b). A distance² of at most 2 (a + b), summed over D numbers, is off by 2 (D + 2) u · (a + b). All
together is less than 4 (D + d + 8) u · (a + b): by so much may a bound exceed U before its row is ruled out.
"""

import torch
from torch import Tensor

LEADING = 64  # d
QUERIES = 256  # patches that are searched together
GROUP = 32  # rows of the bank whose smallest bound is compared first
MOST = 256  # rows per patch whose exact distances are worth the bound: with more, all rows are compared
TOGETHER = (1024, 16384)  # patches that are compared with all rows together: a CPU likes its cache, and a GPU


class Bank:
    """The rows float32 [N, D] of a bank, the images they belong to (`owners` [N]), and what searches need of them."""

    def __init__(self, rows: Tensor, owners: Tensor):
        self.rows, self.owners = rows, owners
        self.size = rows.square().sum(1)
        #: whether all rows belong to one image: then none may be left out
        self.one_owner = bool((owners == owners[:1]).all())
        self.short: Tensor | None = None
        if rows.device.type == "cpu" and len(rows) >= 4096 and rows.shape[1] >= 4 * LEADING:
            self._shorten()

    def _shorten(self) -> None:
        """Find the leading directions on a part of the rows, and the bounds' numbers of all rows."""
        part = self.rows[:: -(-len(self.rows) // 8192)].double()
        self.mean = part.mean(0)
        part -= self.mean
        self.basis = torch.linalg.eigh(part.T @ part).eigenvectors[:, -LEADING:]
        short = torch.cat([self._short(rows) for rows in self.rows.split(8192)])
        size = short.square().sum(1)
        self.largest = size.amax()
        missing = -len(short) % GROUP
        self.short = torch.nn.functional.pad(short, (0, 0, 0, missing))
        self.short_size = torch.nn.functional.pad(size, (0, missing), value=torch.inf)

    def _short(self, x: Tensor) -> Tensor:
        """(P(x − m), ρ(x)) of rows [n, D], [n, d + 1]."""
        x = x.double() - self.mean
        leading = x @ self.basis
        rest = (x.square().sum(1) - leading.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat((leading, rest[:, None]), 1).float()

    def nearest(self, x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distance [B, M] of patches [B, M, D] to the nearest row, and that row's index [B, M].

        The rows of image own[i] are left out for the patches of x[i], unless no row would remain.
        """
        own = None if self.one_owner else own
        if self.short is None or x.is_cuda:
            images = None if own is None else own.repeat_interleave(x.shape[1])
            index = torch.cat(
                [
                    nearest_in_parts(some, self.rows, self.size, self.owners, mine)
                    for some, mine in _split(x.flatten(0, 1), images, TOGETHER[x.is_cuda])
                ]
            ).view(x.shape[:2])
        else:
            found = []
            for i, patches in enumerate(x):
                left_out = None if own is None else self.owners == own[i]
                found.append(torch.cat([self._bounded(some, left_out) for some in patches.split(QUERIES)]))
            index = torch.stack(found)
        return torch.linalg.vector_norm(x - self.rows[index], dim=2), index

    def _bounded(self, x: Tensor, left_out: Tensor | None) -> Tensor:
        """The nearest row's index [n] for patches [n, D]; the first one where several are."""
        assert self.short is not None
        short, short_size = self._short(x), self.short_size
        if left_out is not None:
            short_size = short_size.clone()
            short_size[: len(left_out)].masked_fill_(left_out, torch.inf)
        bounds = torch.addmm(short_size, short, self.short.T, alpha=-2)  # less ‖x‖², for all rows
        groups = bounds.view(len(x), GROUP, -1)  # a group's rows are [:, :, g]
        least = groups.amin(1)
        group = least.argmin(1)
        rows = torch.arange(len(x))
        first = groups[rows, :, group].argmin(1) * groups.shape[2] + group
        size = short.square().sum(1)
        slack = 4 * (x.shape[1] + short.shape[1] + 8) * 2**-24 * (size + self.largest)
        limit = (x - self.rows[first]).square().sum(1) - size + slack
        patch, group = (least <= limit[:, None]).nonzero().unbind(1)
        if len(patch) > MOST * len(x):
            return nearest_in_parts(x, self.rows, self._size(left_out))
        at, member = (groups[patch, :, group] <= limit[patch, None]).nonzero().unbind(1)
        patch, row = patch[at], member * groups.shape[2] + group[at]
        if len(patch) > MOST * len(x):
            return nearest_in_parts(x, self.rows, self._size(left_out))
        pairs = zip(patch.split(8192), row.split(8192), strict=True)
        distance = torch.cat([(x[i] - self.rows[j]).square_().sum(1) for i, j in pairs])
        best = torch.full((len(x),), torch.inf).scatter_reduce_(0, patch, distance, "amin")
        found = distance == best[patch]
        index = torch.full((len(x),), len(self.rows))
        return index.scatter_reduce_(0, patch[found], row[found], "amin")

    def _size(self, left_out: Tensor | None) -> Tensor:
        return self.size if left_out is None else self.size.masked_fill(left_out, torch.inf)


def nearest_in_parts(
    x: Tensor,
    bank: Tensor,
    size: Tensor,
    owners: Tensor | None = None,
    own: Tensor | None = None,
    part: int = 4096,
) -> Tensor:
    """The nearest row's index [M] for patches [M, D], by matrix products in float32 with parts of the bank [N, D].

    Nothing waits for a GPU, and an exported graph takes any M.

    Args:
        size: ‖y‖² of the bank's rows [N]; infinite for rows that are left out.
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


def _split(x: Tensor, own: Tensor | None, count: int) -> list[tuple[Tensor, Tensor | None]]:
    parts = x.split(count)
    return list(zip(parts, [None] * len(parts) if own is None else own.split(count), strict=True))
