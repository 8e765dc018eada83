"""The sPRO of Bergmann et al. literally: every distinct score is a threshold, every region is looked at."""

from itertools import pairwise

import numpy as np


def slow_spro(maps, regions, limit):
    """maps: [H, W] each. regions: of each image, pairs (mask, saturation)."""
    maps = [amap.astype(float) for amap in maps]
    unions = [np.any([mask for mask, _ in found], axis=0) if found else np.zeros(m.shape, bool)
              for m, found in zip(maps, regions, strict=True)]  # fmt: skip
    normal = np.concatenate([amap[~union] for amap, union in zip(maps, unions, strict=True)])
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([amap.ravel() for amap in maps]))[::-1]:
        found = [
            min((amap[mask] >= threshold).sum() / saturation, 1)
            for amap, of_image in zip(maps, regions, strict=True)
            for mask, saturation in of_image
        ]
        points.append(((normal >= threshold).mean(), np.mean(found)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit
