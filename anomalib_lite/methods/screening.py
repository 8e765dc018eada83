"""Bounds that rule out most rows of a large bank before distances are computed, so that a CPU searches faster."""

import torch
from torch import Tensor

from anomalib_lite.features.backbones import has_bf16

LARGE = 4096  # rows of a bank that is worth screening
ENERGY = 0.95  # of the bank's variance, in the first directions; more of them leave fewer rows to compare
SAMPLE = 4096  # rows that the directions come from
PART, GROUPS = 2048, 64  # rows of one product; groups of its rows whose largest bounds are compared first
TRIED = 4  # rows whose distances give the first upper bound of the least distance
PAIRS = 16384  # distances computed at once
FEW = 1 / 200  # the largest share of pairs that are worth comparing one by one
ROUNDING = 2**-14  # of ‖x‖·‖y‖: more than the float32 sums of a bound can lose


class Screen:
    """For patches x and a bank's rows y, upper bounds of s(x, y) = x·y − ‖y‖²/2, from which ‖x − y‖² = ‖x‖² − 2 s.

    With x and y less the bank's mean, Vx the coordinates of x in its first principal directions and r(x) the norm of
    the rest, x·y ≤ Vx·Vy + r(x) r(y) (Cauchy–Schwarz). Let x̂ be the vector (Vx, r(x)) rounded to `dtype`. The
    rounding changes this by at most ‖x‖ ‖y − ŷ‖ + ‖x − x̂‖ ‖ŷ‖. All terms are columns of one product of matrices.

    Args:
        rows: float32 [N, D].
    """

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.dtype = torch.bfloat16 if has_bf16(rows.device) else torch.float32
        self.mean = rows.mean(0)
        sample = rows[:: max(1, len(rows) // SAMPLE)] - self.mean
        energy, directions = torch.linalg.eigh(sample.T @ sample)
        share = energy.flip(0).clamp_min(0).cumsum(0) / energy.clamp_min(0).sum()
        count = int((share < ENERGY).sum()) + 1
        self.directions = directions.flip(1)[:, : -(-(count + 6) // 32) * 32 - 6].contiguous()  # 6 more columns below
        size, rounded, length, error = self.coordinates(rows)
        half, halves = size * (ROUNDING - 0.5), []
        for _ in range(3):  # −‖y‖²/2 in three numbers, so that its rounding is lost in ROUNDING
            halves.append(half.to(self.dtype))
            half = half - halves[-1].float()
        columns = torch.column_stack([rounded, *halves, error, length])
        padded = columns.new_zeros(-(-len(rows) // PART) * PART, columns.shape[1])
        padded[: len(rows)] = columns
        padded[len(rows) :, rounded.shape[1]] = -torch.inf
        self.parts = padded.view(-1, PART, columns.shape[1]).transpose(1, 2).contiguous()  # [parts, columns, PART]

    def buffer(self, patches: int) -> Tensor:
        """Room for the bounds of so many patches and all rows, [parts, patches, PART]."""
        return self.parts.new_empty(len(self.parts), patches, PART)

    def coordinates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """‖x‖² [M]; in `dtype` x̂ [M, K + 1], and numbers [M] above ‖x‖ and ‖x̂‖ and above ‖x − x̂‖."""
        x = x - self.mean
        size, first = x.square().sum(1), x @ self.directions
        rest = (size - first.square().sum(1)).clamp_min(0) + size * 2**-16
        exact = torch.column_stack([first, rest.sqrt()])
        rounded, length = exact.to(self.dtype), norm(exact)
        error = norm(exact - rounded.float()) + ROUNDING * length
        return size, rounded, *((1 + 2**-7) * torch.stack([length, error])).to(self.dtype)

    def bound(self, x: Tensor, buffer: Tensor) -> Tensor:
        """Bounds of patches [M, D] with all rows, written into `buffer` [parts, M, PART]; ‖x‖² [M]."""
        size, rounded, length, error = self.coordinates(x)
        columns = torch.column_stack([rounded, rounded.new_ones(len(x), 3), length, error])
        for part, bounds in zip(self.parts, buffer, strict=True):
            torch.mm(columns, part, out=bounds)
        return size

    def nearest(self, x: Tensor, excluded: Tensor | None, buffer: Tensor) -> Tensor | None:
        """The nearest row's index [M] for patches [M, D], or None if too many rows remain.

        Args:
            excluded: indices of rows that are left out.
            buffer: what `buffer(M)` gives; it is overwritten with the bounds.
        """
        size = self.bound(x, buffer)
        if excluded is not None:
            buffer[excluded // PART, :, excluded % PART] = -torch.inf
        each = torch.arange(len(x))
        groups = buffer.unflatten(2, (-1, GROUPS))  # [parts, M, members, groups]: strided, so that the maximum is fast
        largest = groups.amax(2).movedim(1, 0).flatten(1)  # [M, parts · groups]

        best = largest.topk(TRIED).indices
        bound, member = groups[best // GROUPS, each[:, None], :, best % GROUPS].max(2)
        row = (best // GROUPS * PART + member * GROUPS + best % GROUPS).clamp_max(len(self.rows) - 1)
        distance = norm(x[:, None] - self.rows[row])
        least, at = distance.masked_fill(bound == -torch.inf, torch.inf).min(1)
        nearest = row[each, at]

        # the rows that may be nearer than `least`
        wanted = (size - least.square()) / 2 - ROUNDING * (size + least.square())
        wanted = wanted.to(self.dtype)  # rounding keeps the order, and the bounds were rounded as well
        patch, group = (largest >= wanted[:, None]).nonzero(as_tuple=True)
        if len(patch) > FEW * len(x) * len(self.rows):  # at least one row of each group remains
            return None
        found, member = (groups[group // GROUPS, patch, :, group % GROUPS] >= wanted[patch, None]).nonzero(
            as_tuple=True
        )
        patch, group = patch[found], group[found]
        row = group // GROUPS * PART + member * GROUPS + group % GROUPS
        if len(row) > FEW * len(x) * len(self.rows):
            return None
        pairs = zip(patch.split(PAIRS), row.split(PAIRS), strict=True)
        distance = torch.cat([norm(x[i] - self.rows[j]) for i, j in pairs])
        least = least.scatter_reduce(0, patch, distance, "amin")
        equal = distance == least[patch]
        return nearest.scatter_reduce(0, patch[equal], row[equal], "amin", include_self=False)


def screen_of(rows: Tensor) -> Screen | None:
    """What screens a bank's rows; None where comparing all rows is no slower: in small banks and on other devices."""
    if rows.device.type != "cpu" or len(rows) < LARGE or not rows.isfinite().all():
        return None
    screen = Screen(rows)
    cost, of_all = (each.shape[1] * each.element_size() for each in (screen.parts, rows))
    return screen if cost < 0.7 * of_all else None


def norm(x: Tensor) -> Tensor:
    """Euclidean norms along the last axis."""
    return torch.linalg.vector_norm(x, dim=-1)
