"""Greedy k-centre selection (Sener and Savarese, ICLR 2018; the coreset of PatchCore, Roth et al., CVPR 2022), exact.

The next pick is the point that lies farthest from all picks. Updating every point's distance after every pick costs
picks × points × dimensions, most of it for points that are never in question. Here a distance is brought up to date
only when it could be the largest: distances only shrink, so an outdated one is an upper bound.
"""

import torch
from torch import Tensor

BLOCK = 4096  # points brought up to date together
SLACK = 1e-5  # relative error allowed to squared distances in float32; what lies closer is decided in float64


def greedy_coreset(points: Tensor, count: int, first: int = 0) -> Tensor:
    """Indices [count] of the picks among `points` [N, D], float32, in order, beginning with `first`.

    The same as of the plain greedy rule in float64, and where distances are equal the first of the points. Needs memory
    for a copy of `points` and of the picks.
    """
    points = points - points.mean(0)
    size = points.square().sum(1)
    picks = torch.empty(count, dtype=torch.long)
    centres, centre_size = points.new_empty(count, points.shape[1]), points.new_empty(count)
    bound = torch.full((len(points),), torch.inf, dtype=torch.float64)  # of the squared distance to the nearest pick
    seen = torch.zeros(len(points), dtype=torch.long)  # so many picks it takes into account

    def pick(number: int, index: int) -> None:
        picks[number], centres[number], centre_size[number] = index, points[index], size[index]
        bound[index] = -1  # never again

    pick(0, first)
    done = 1
    while done < count:
        largest = bound.topk(min(BLOCK + 1, len(points)))
        block, rest = largest.indices[:BLOCK], largest.values[BLOCK] if len(points) > BLOCK else -torch.inf
        _refresh(points, size, centres[:done], centre_size[:done], bound, seen, block)
        block = block[bound[block] >= rest].sort().values  # only these can be next, as long as they stay above the rest
        near, mine = bound[block], points[block].double()
        while done < count and len(block):
            best = int(near.argmax())
            if near[best] < rest:
                break
            pick(done, int(block[best]))
            done += 1
            near = torch.minimum(near, (mine - mine[best]).square().sum(1))
            near[best] = -1
        bound[block], seen[block] = near, done
    return picks


def _refresh(
    points: Tensor, size: Tensor, centres: Tensor, centre_size: Tensor, bound: Tensor, seen: Tensor, block: Tensor
) -> None:
    """Bring `bound` and `seen` of a block of points up to date: the nearest of the centres they have not seen, found by
    matrix products in float32, its distance in float64, and wherever rounding could have hidden a nearer one, that too.
    """
    block = block[seen[block].sort().indices]
    for part in block.split(512):
        since = int(seen[part[0]])
        x, new, new_size = points[part], centres[since:], centre_size[since:]
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
