"""Smoothing of a method's raw maps, and image scores from the smoothed maps."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_lite.errors import UserError
from anomalib_lite.methods.resizing import resize

PIXELS = 2**22  # of maps that are filtered together: a convolution takes several copies of them


def smooth(maps: Tensor, how) -> Tensor:
    """Smooth maps [B, H, W]. `how` is None (no smoothing), the sigma of a Gaussian, or one of the dicts
    {"sigma": 4, "size": 5} (a Gaussian cut to 5 taps), {"box": 11, "times": 3} (a box filter, applied three times) and
    {"pool": 16} (means of all 16×16 windows within the map, for image scores: the map becomes [B, H - 15, W - 15]).

    The maps are mirrored at borders, with the edge pixel repeated, and the Gaussian is cut at four sigma: both are the
    defaults of scipy.ndimage.gaussian_filter. A Gaussian with "pad": "zeros" sees zeros beyond the borders instead, as
    some published code does: this lowers the scores of border pixels.
    """
    if how is None:
        return maps
    how = how if isinstance(how, dict) else {"sigma": how}
    if "pool" in how:
        height, width = (min(how["pool"], n) for n in maps.shape[-2:])
        if torch.compiler.is_exporting():  # onnxruntime adds up whole windows: rows first takes an eighth of its time
            return F.avg_pool2d(F.avg_pool2d(maps[:, None], (height, 1), stride=1), (1, width), stride=1)[:, 0]
        return F.avg_pool2d(maps[:, None], (height, width), stride=1)[:, 0]
    if "box" in how:
        taps = torch.full((how["box"],), 1 / how["box"], dtype=torch.float64)
    else:
        radius = how["size"] // 2 if how.get("size") else int(4 * how["sigma"] + 0.5)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        taps = torch.exp(-0.5 * (offsets / how["sigma"]) ** 2)
        taps /= taps.sum()
    zeros = how.get("pad") == "zeros"
    for _ in range(how.get("times") or 1):
        maps = _filter(_filter(maps, taps, zeros).mT, taps, zeros).mT
    return maps.contiguous()


def _filter(maps: Tensor, taps: Tensor, zeros: bool) -> Tensor:
    """Correlate the last axis with an odd number of taps; beyond the edges are zeros, or the maps are mirrored
    (…b a | a b c | c b…)."""
    n, radius, weight = maps.shape[-1], len(taps) // 2, taps.to(maps)[None, None]
    at = torch.arange(-radius, n + radius, device=maps.device) % (2 * n)  # mirroring has period 2n
    mirrored = torch.where(at < n, at, 2 * n - 1 - at)
    lines = maps.reshape(-1, 1, n)
    together = [lines] if torch.compiler.is_exporting() else lines.split(max(1, PIXELS // n))  # a file's batch may vary
    parts = [
        F.conv1d(rows, weight, padding=radius) if zeros else F.conv1d(rows[..., mirrored], weight) for rows in together
    ]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(maps.shape)


def image_scores(maps: Tensor, how) -> Tensor:
    """Image scores [B] of maps [B, H, W]: a map's maximum ("max"), mean ("mean"), or the mean of its top share."""
    flat = maps.flatten(1)
    if how in ("max", "own"):  # "own": the method's own scores replace these
        return flat.amax(1)
    if how == "mean":
        return _row_means(flat)
    return _row_means(flat.topk(max(1, math.floor(how * flat.shape[1])), dim=1).values)


def _row_means(rows: Tensor) -> Tensor:
    """Means [B] of rows [B, N], summed in blocks: torch's order of summation for a long row depends on the number of
    rows and threads."""
    count = rows.shape[1]
    return F.pad(rows, (0, -count % 1024)).unflatten(1, (-1, 1024)).sum(2).sum(1) / count


def maps_and_scores(found: Any, name: str, scores: bool) -> tuple[Tensor, Tensor | None]:
    """What `anomaly_map` of the method `name` has returned: maps float32 [B, h, w], and images' scores [B] or None.

    Args:
        scores: whether the images' scores are needed (scoring.image_score=own).

    Raises:
        UserError: it has returned something else.
    """
    maps, own = found if isinstance(found, tuple) else (found, None)
    if not isinstance(maps, Tensor) or maps.ndim != 3:
        what = f"a tensor {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise UserError(f"{name}.anomaly_map has returned {what}; it must return one map for each image, [B, h, w]")
    if scores and own is None:
        raise UserError(f"scoring.image_score=own: {name}.anomaly_map must return (maps, image scores [B])")
    return maps.float(), own


def smoothed_and_scored(raw: Tensor, size: tuple[int, ...], scoring: dict[str, Any]) -> dict[str, Tensor]:
    """The raw maps [B, h, w] resized to `size` (H, W) and smoothed, as `map` [B, H, W], and their `score` [B]."""
    if raw.shape[-2:] != size:
        raw = resize(raw[:, None], size)[:, 0]
    pixels, image = scoring["pixel_smooth"], scoring["image_smooth"]
    maps = smooth(raw, pixels)
    for_score = maps if image in ("same", pixels) else smooth(raw, image)
    return {"map": maps, "score": image_scores(for_score, scoring["image_score"])}
