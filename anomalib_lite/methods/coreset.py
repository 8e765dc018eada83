"""Exact greedy k-centre selection (Sener and Savarese, ICLR 2018): the coreset of PatchCore (Roth et al., CVPR 2022).

The next pick is the point with the largest distance to its nearest pick. Updating every point's distance after every
pick costs picks × points × dimensions, mostly for points that can't be the next pick. Here a distance is updated only
if it could be the largest: distances only decrease, so an outdated distance is an upper bound.
"""

import torch
from torch import Tensor

BLOCK = 4096  # number of points updated together
SLACK = 1e-5  # relative error of squared distances in float32; closer distances are compared in float64


def greedy_coreset(points: Tensor, count: int, first: int = 0) -> Tensor:
    """Indices int64 [count] of the picks among `points` float32 [N, D] in the order of selection, starting at `first`.

    The picks equal those of the plain greedy rule in float64; among equal distances the first point is picked. The
    function works on the points' device and needs memory for a copy of the picks.
    """
    mean, device = points.mean(0), points.device
    size = torch.cat([(part - mean).square().sum(1) for part in points.split(BLOCK)])
    picks = torch.empty(count, dtype=torch.long, device=device)
    centres, centre_size = points.new_empty(count, points.shape[1]), points.new_empty(count)
    # of the squared distance to the nearest pick; number of picks that each bound accounts for
    bound = torch.full((len(points),), torch.inf, dtype=torch.float64, device=device)
    seen = torch.zeros(len(points), dtype=torch.long, device=device)

    def pick(number: int, index: Tensor) -> None:
        place = slice(number, number + 1)
        picks[place], centres[place], centre_size[place] = index, points[index] - mean, size[index]
        bound[index] = -1  # a pick is not picked again

    pick(0, torch.tensor([first], device=device))
    done = 1
    while done < count:
        largest = bound.topk(min(BLOCK + 1, len(points)))
        block, rest = largest.indices[:BLOCK], largest.values[BLOCK] if len(points) > BLOCK else -torch.inf
        _refresh(points, mean, size, centres[:done], centre_size[:done], bound, seen, block)
        block = block[bound[block] >= rest].sort().values  # candidates for the next pick while above the rest
        near, members = bound[block], (points[block] - mean).double()
        while done < count and len(block):
            best = near.argmax(0, keepdim=True)
            if near[best] < rest:
                break
            pick(done, block[best])
            done += 1
            near = torch.minimum(near, (members - members[best]).square().sum(1))
            near[best] = -1
        bound[block], seen[block] = near, done
    return picks


def _refresh(
    points: Tensor,
    mean: Tensor,
    size: Tensor,
    centres: Tensor,
    centre_size: Tensor,
    bound: Tensor,
    seen: Tensor,
    block: Tensor,
) -> None:
    """Update `bound` and `seen` of a block of points with the centres that their bounds do not account for yet.

    Matrix products in float32 find the nearest centre. The distances of this centre, and of all centres that could be
    nearer within the rounding error, are then computed in float64.
    """
    block = block[seen[block].sort().indices]
    for part in block.split(512):
        since = int(seen[part[0]])
        x, new, new_size = points[part] - mean, centres[since:], centre_size[since:]
        if not len(new):
            continue
        squares = torch.addmm(new_size, x, new.T, alpha=-2).add_(size[part, None])  # ‖x − c‖² [512, new]
        least = squares.min(1)
        exact = (x.double() - new[least.indices].double()).square().sum(1)
        margin = SLACK * (size[part] + new_size.amax())
        rows, columns = (squares <= (least.values + 2 * margin)[:, None]).nonzero().unbind(1)
        doubt = rows.bincount(minlength=len(part)) > 1
        if doubt.any():
            keep = doubt[rows]
            rows, columns = rows[keep], columns[keep]
            others = (x[rows].double() - new[columns].double()).square().sum(1)
            exact.scatter_reduce_(0, rows, others, "amin")
        bound[part] = torch.minimum(bound[part], exact)
        seen[part] = since + len(new)


def sparse_projection(points: Tensor, dimensions: int) -> Tensor:
    """Points [N, D] in fewer dimensions, [N, dimensions], by a sparse random matrix: distances are kept on average.

    Its entries are ±√(s / dimensions) with probability 1 / 2s each, else 0, where s = √D (Li, Hastie and Church, "Very
    Sparse Random Projections", KDD 2006). They are drawn with torch's global generator.
    """
    width = points.shape[1]
    drawn, s = torch.rand(width, dimensions), width**0.5
    signs = (drawn < 0.5 / s).float() - (drawn > 1 - 0.5 / s).float()
    return points @ (signs * (s / dimensions) ** 0.5).to(points)
