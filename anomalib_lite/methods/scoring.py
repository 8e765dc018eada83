"""From a method's raw maps to smoothed maps and image scores, by configuration."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth(maps: Tensor, how) -> Tensor:
    """Smooth maps [B, H, W]. `how` is None, the sigma of a Gaussian, or a dict of its kind:
    {"sigma": 4, "size": 5} (a Gaussian cut to 5 taps), {"box": 11, "times": 3} (a box filter, applied repeatedly), or
    {"pool": 16} (means of all 16×16 windows within the map, which shrinks to [B, H - 15, W - 15]: for image scores).

    Borders are mirrored with the edge repeated and the Gaussian reaches four sigma, as scipy.ndimage.gaussian_filter
    has them by default.
    """
    if how is None:
        return maps
    how = how if isinstance(how, dict) else {"sigma": how}
    if "pool" in how:
        height, width = (min(how["pool"], n) for n in maps.shape[-2:])
        return F.avg_pool2d(maps[:, None], (height, width), stride=1)[:, 0]
    if "box" in how:
        taps = torch.full((how["box"],), 1 / how["box"], dtype=torch.float64)
    else:
        radius = how["size"] // 2 if how.get("size") else int(4 * how["sigma"] + 0.5)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        taps = torch.exp(-0.5 * (offsets / how["sigma"]) ** 2)
        taps /= taps.sum()
    for _ in range(how.get("times", 1)):
        maps = _filter(_filter(maps, taps).mT, taps).mT
    return maps.contiguous()


def _filter(maps: Tensor, taps: Tensor) -> Tensor:
    """Correlate the last axis with an odd number of taps; edges are mirrored (…b a | a b c | c b…)."""
    n, radius = maps.shape[-1], len(taps) // 2
    at = torch.arange(-radius, n + radius, device=maps.device) % (2 * n)  # mirrored with period 2n, however far
    padded = maps[..., torch.where(at < n, at, 2 * n - 1 - at)]
    rows = padded.reshape(-1, 1, n + 2 * radius)
    return F.conv1d(rows, taps.to(maps)[None, None]).reshape(maps.shape)


def image_scores(maps: Tensor, how) -> Tensor:
    """One score per map [B, H, W] -> [B]: its maximum ("max"), its mean ("mean"), or the mean of its top share."""
    flat = maps.flatten(1)
    if how in ("max", "own"):  # a method that has scores of its own replaces these
        return flat.amax(1)
    if how == "mean":
        return _row_means(flat)
    return _row_means(flat.topk(max(1, math.floor(how * flat.shape[1])), dim=1).values)


def _row_means(rows: Tensor) -> Tensor:
    """Means of [B, N], summed in blocks: torch adds up a long single row in another order than several, or than with
    another number of threads."""
    count = rows.shape[1]
    return F.pad(rows, (0, -count % 1024)).unflatten(1, (-1, 1024)).sum(2).sum(1) / count
