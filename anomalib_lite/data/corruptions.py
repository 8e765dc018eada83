"""Corruption of a normal image: a few random shapes are filled with other content.

The recipe is Bauer et al.'s (arXiv 2206.11723, `ssae`), with details from re-implementations. It makes ssae's training
images (`data.corrupt`), and all methods' validation anomalies from held-out training images. Other code draws the
synthetic data set's defects, so no method trains on them.
"""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from anomalib_lite.data.image_folders import walk
from anomalib_lite.data.samples import load_rgb
from anomalib_lite.errors import UserError

SHAPES = {"stain": 0.6, "perlin": 0.2, "rectangle": 0.1, "line": 0.1}
CONTENTS = {"elastic": 0.4, "texture": 0.3, "elsewhere": 0.2, "colour": 0.05, "blur": 0.05}
AREA = (0.005, 0.2)  # changed pixels as a share of the image
MAX_SHAPES = 3
MAX_BETA = 0.8  # weight of the clean image inside a shape is β ~ U(0, MAX_BETA)
STAIN_AXES, STAIN_POINTS = (0.01, 0.12), 20  # semi-axes as shares of the shorter side; number of contour points
TRIES = 100  # failed tries after which all contents are allowed
HOPELESS = 5000  # failed tries after which the options are refused
Box = tuple[slice, slice]  # the rows and columns of an image that a shape covers


def corrupt(
    image: np.ndarray,
    rng: Generator,
    *,
    p_clean: float = 0.0,
    shapes: dict[str, float] | None = None,
    contents: dict[str, float] | None = None,
    area: tuple[float, float] = AREA,
    max_shapes: int = MAX_SHAPES,
    max_beta: float = MAX_BETA,
    textures: str | Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the corrupted image uint8 [H, W, 3] and the mask bool [H, W] of changed pixels; `image` is not modified.

    `shapes` and `contents` give each kind its probability (None: SHAPES, CONTENTS). With probability `p_clean` the
    image stays clean and the mask is empty; otherwise the mask's share of the image lies within `area`.
    `textures` is a folder of images from which foreign textures are cropped; None draws them.
    """
    if p_clean and rng.random() < p_clean:
        return image.copy(), np.zeros(image.shape[:2], bool)
    chosen = _known("shapes", shapes or SHAPES, SHAPES)
    fillings = _known("contents", contents or CONTENTS, CONTENTS)
    tries = 0
    while True:  # repeat if the shapes are too small or too large, or if deforming a flat patch changes no pixel
        result = image.copy()
        for _ in range(rng.integers(1, max_shapes + 1)):
            inside = _SHAPES[_pick(chosen, rng)](image.shape[0], image.shape[1], rng)
            if not area[0] / max_shapes < inside.mean() < area[1]:
                continue  # computing the content takes longest
            kind, box = _pick(fillings if tries < TRIES else CONTENTS, rng), _box(inside)
            weight = inside[box][..., None] * np.float32(1 - rng.uniform(0, max_beta))
            if kind == "texture" and textures is not None:
                content = _from_folder(image, rng, box, str(textures))
            else:
                content = _CONTENTS[kind](image, rng, box)
            patch = result[box].astype(np.float32)
            result[box] = np.rint(patch + weight * (content - patch)).astype(np.uint8)
        mask = (result != image).any(-1)
        if area[0] <= mask.mean() <= area[1]:
            return result, mask
        tries += 1
        if tries == HOPELESS:
            raise UserError(f"data.corrupt.area={area}: {tries} tries gave no shapes of this size; give a wider range")


def _known(option: str, weights: dict[str, float], known: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in known or not isinstance(weight, int | float) or weight < 0:
            raise UserError(f"data.corrupt.{option}={weights}: give probabilities for {', '.join(known)}")
    if not any(weights.values()):
        raise UserError(f"data.corrupt.{option}={weights}: give a probability above 0 for at least one of them")
    return weights


def _pick(weights: dict[str, float], rng: Generator) -> str:
    p = np.array(list(weights.values()), np.float64)
    return list(weights)[rng.choice(len(p), p=p / p.sum())]


def _box(inside: np.ndarray) -> Box:
    x, y, width, height = cv2.boundingRect((inside > 0).astype(np.uint8))
    return slice(y, y + height), slice(x, x + width)


# Shapes: (height, width, rng) -> float32 [H, W] in [0, 1].


def _stain(height: int, width: int, rng: Generator) -> np.ndarray:
    """An ellipse whose contour points are jittered, with a smoothed edge."""
    side = min(height, width)
    axes = rng.uniform(*STAIN_AXES, 2) * side
    turn, tilt = np.linspace(0, 2 * np.pi, STAIN_POINTS, endpoint=False), rng.uniform(0, np.pi)
    x, y = np.array([np.cos(turn), np.sin(turn)]) * axes[:, None] * rng.uniform(0.6, 1.4, STAIN_POINTS)
    points = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], 1)
    return _filled(height, width, points + rng.uniform(0, (width, height)), smooth=0.008 * side)


def _rectangle(height: int, width: int, rng: Generator) -> np.ndarray:
    half = rng.uniform(0.02, 0.2, 2) * min(height, width)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    return _filled(height, width, corners + rng.uniform(0, (width, height)))


def _line(height: int, width: int, rng: Generator) -> np.ndarray:
    ends = rng.uniform(0, (width, height), (2, 2)).round().astype(int).tolist()
    thick = max(1, round(rng.uniform(0.004, 0.02) * min(height, width)))
    return cv2.line(np.zeros((height, width), np.float32), ends[0], ends[1], 1.0, thick)


def _filled(height: int, width: int, points: np.ndarray, smooth: float = 0) -> np.ndarray:
    inside = np.zeros((height, width), np.float32)
    cv2.fillPoly(inside, [np.round(points).astype(np.int32)], 1.0)
    if smooth < 0.3:
        return inside
    soft = cv2.GaussianBlur(inside, (0, 0), smooth)
    return np.where(soft > 0.05, soft, 0)  # cuts off the blur's long tail


def _perlin_shape(height: int, width: int, rng: Generator) -> np.ndarray:
    return (_perlin(height, width, rng) > 0.5).astype(np.float32)


def _perlin(height: int, width: int, rng: Generator, box: Box = (slice(None), slice(None))) -> np.ndarray:
    """The part in `box` of Perlin's gradient noise, about -1..1, with 2 to 32 cells along each side of [H, W]."""
    cells = 2 ** rng.integers(1, 6, 2)
    angle = rng.uniform(0, 2 * np.pi, cells + 1).astype(np.float32)
    y, x = (np.arange(n, dtype=np.float32)[s] * c / n for n, c, s in zip((height, width), cells, box, strict=True))
    i, j = y.astype(int), x.astype(int)
    v, u = (y - i).astype(np.float32)[:, None], (x - j).astype(np.float32)[None]
    gy, gx = np.sin(angle), np.cos(angle)

    def corner(a: int, b: int) -> np.ndarray:
        at = np.ix_(i + a, j + b)
        return gy[at] * (v - a) + gx[at] * (u - b)

    fade_v, fade_u = (t**3 * (t * (6 * t - 15) + 10) for t in (v, u))
    top, bottom = (corner(a, 0) + fade_u * (corner(a, 1) - corner(a, 0)) for a in (0, 1))
    return np.float32(np.sqrt(2)) * (top + fade_v * (bottom - top))


# Contents: (image, rng, box) -> [h, w, 3] in 0..255, the new pixels of the shape's box.


def _grid(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel of the box, float32 [h, w]."""
    return np.meshgrid(*(np.arange(s.start, s.stop, dtype=np.float32) for s in box), indexing="ij")  # type: ignore


def _elastic(image: np.ndarray, rng: Generator, box: Box) -> np.ndarray:
    height, width = image.shape[:2]
    reach = np.float32(rng.uniform(0.02, 0.08) * min(height, width))
    y, x = (axis + reach * _perlin(height, width, rng, box) for axis in _grid(box))
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _texture(image: np.ndarray, rng: Generator, box: Box) -> np.ndarray:
    """A foreign texture: stripes, clouds or speckles between two colours."""
    height, width = image.shape[:2]
    kind, one, two = rng.integers(3), *rng.uniform(0, 255, (2, 3)).astype(np.float32)
    y, x = _grid(box)
    if kind == 0:
        wave = (rng.uniform(4, 40, 2) * rng.choice([-1, 1], 2) * 2 * np.pi / (width, height)).astype(np.float32)
        mix = 0.5 + 0.5 * np.sin(wave[0] * x + wave[1] * y)
    else:
        mix = 0.5 + 0.5 * _perlin(height, width, rng, box) if kind == 1 else rng.random(x.shape, np.float32)
    return one + mix[..., None] * (two - one)


def _from_folder(image: np.ndarray, rng: Generator, box: Box, folder: str) -> np.ndarray:
    """A crop, as large as the box, of a random image in the folder; an image smaller than `image` is enlarged."""
    files = _texture_files(folder)
    texture = load_rgb(files[rng.integers(len(files))])
    scale = max(n / m for n, m in zip(image.shape[:2], texture.shape[:2], strict=True))
    if scale > 1:
        size = [max(n, round(scale * m)) for n, m in zip(image.shape[:2], texture.shape[:2], strict=True)]
        texture = cv2.resize(texture, size[::-1], interpolation=cv2.INTER_LINEAR)
    sides = [s.stop - s.start for s in box]
    top, left = (int(rng.integers(n - side + 1)) for n, side in zip(texture.shape[:2], sides, strict=True))
    return texture[top : top + sides[0], left : left + sides[1]]


@lru_cache(maxsize=4)
def _texture_files(folder: str) -> list[Path]:
    files = walk(Path(folder).expanduser()).images
    if not files:
        raise UserError(f"data.corrupt.textures={folder}: no folder with images; give one such as DTD's, or null")
    return files


def _elsewhere(image: np.ndarray, rng: Generator, box: Box) -> np.ndarray:
    """The patch at a random shift from the box; the shift wraps around the image's borders."""
    shift = [int(rng.integers(n // 8, n - n // 8)) for n in image.shape[:2]]
    rows, columns = ((np.arange(s.start, s.stop) - d) % n for s, d, n in zip(box, shift, image.shape, strict=False))
    return image[np.ix_(rows, columns)]


def _colour(image: np.ndarray, rng: Generator, box: Box) -> np.ndarray:
    gain, offset = (rng.uniform(low, high, 3).astype(np.float32) for low, high in ((0.6, 1.4), (-60, 60)))
    return np.clip(image[box] * gain + offset, 0, 255)


def _blur(image: np.ndarray, rng: Generator, box: Box) -> np.ndarray:
    sigma = rng.uniform(0.008, 0.03) * min(image.shape[:2])
    margin = int(4 * sigma) + 1  # as far as the filter reaches
    (top, rows), (left, columns) = ((max(s.start - margin, 0), s) for s in box)
    around = image[top : rows.stop + margin, left : columns.stop + margin]
    blurred = cv2.GaussianBlur(around, (0, 0), sigma)
    return blurred[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


_SHAPES = {"stain": _stain, "perlin": _perlin_shape, "rectangle": _rectangle, "line": _line}
_CONTENTS = {"elastic": _elastic, "texture": _texture, "elsewhere": _elsewhere, "colour": _colour, "blur": _blur}
