"""Corruption of a normal image by a few random shapes filled with something else (recipe of the self-supervised
autoencoder, Bauer et al., arXiv 2206.11723, as recalled from re-implementations). It makes validation anomalies from
held-out training images. The synthetic data set's defects are drawn by other code, so that no method trains on them.
"""

import cv2
import numpy as np
from numpy.random import Generator

SHAPES = {"stain": 0.6, "perlin": 0.2, "rectangle": 0.1, "line": 0.1}
CONTENTS = {"elastic": 0.4, "texture": 0.3, "elsewhere": 0.2, "colour": 0.05, "blur": 0.05}
AREA = (0.005, 0.2)  # changed pixels as a share of the image
MAX_SHAPES = 3
MAX_BETA = 0.8  # weight of the clean image inside a shape is β ~ U(0, MAX_BETA)
STAIN_AXES, STAIN_POINTS = (0.01, 0.12), 20  # semi-axes as shares of the shorter side; points of the jittered contour


def corrupt(
    image: np.ndarray,
    rng: Generator,
    *,
    p_clean: float = 0.0,
    shapes: dict[str, float] = SHAPES,
    contents: dict[str, float] = CONTENTS,
    area: tuple[float, float] = AREA,
    max_shapes: int = MAX_SHAPES,
    max_beta: float = MAX_BETA,
) -> tuple[np.ndarray, np.ndarray]:
    """The corrupted image uint8 [H, W, 3] and the mask bool [H, W] of the pixels that changed; `image` stays as it is.

    `shapes` and `contents` give each kind its probability. The mask's share of the image lies within `area`, so it is
    never empty, unless the image is left clean, which happens with probability `p_clean`.
    """
    if p_clean and rng.random() < p_clean:
        return image.copy(), np.zeros(image.shape[:2], bool)
    while True:  # a shape may be too small or too large, and a flat patch looks the same when deformed: draw again
        result = image.copy()
        for _ in range(rng.integers(1, max_shapes + 1)):
            inside = _SHAPES[_pick(shapes, rng)](image.shape[0], image.shape[1], rng)
            if not area[0] / max_shapes < inside.mean() < area[1]:
                continue  # saves the content, which takes longest
            weight = inside[..., None] * (1 - rng.uniform(0, max_beta))
            content = _CONTENTS[_pick(contents, rng)](image, rng)
            result = np.rint(result + weight * (content - result.astype(np.float32))).astype(np.uint8)
        mask = (result != image).any(-1)
        if area[0] <= mask.mean() <= area[1]:
            return result, mask


def _pick(weights: dict[str, float], rng: Generator) -> str:
    p = np.array(list(weights.values()), np.float64)
    return list(weights)[rng.choice(len(p), p=p / p.sum())]


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
    return np.where(soft > 0.05, soft, 0)  # without the blur's long tail


def _perlin_shape(height: int, width: int, rng: Generator) -> np.ndarray:
    return (_perlin(height, width, rng) > 0.5).astype(np.float32)


def _perlin(height: int, width: int, rng: Generator) -> np.ndarray:
    """Perlin's gradient noise [H, W], about -1..1, with 2 to 32 cells along each side."""
    cells = 2 ** rng.integers(1, 6, 2)
    y, x = (np.arange(n, dtype=np.float32) * c / n for n, c in zip((height, width), cells, strict=True))
    i, j = y.astype(int), x.astype(int)
    v, u = (y - i)[:, None], (x - j)[None]
    angle = rng.uniform(0, 2 * np.pi, cells + 1).astype(np.float32)
    gy, gx = np.sin(angle), np.cos(angle)

    def corner(a: int, b: int) -> np.ndarray:
        at = np.ix_(i + a, j + b)
        return gy[at] * (v - a) + gx[at] * (u - b)

    fade_v, fade_u = (t**3 * (t * (6 * t - 15) + 10) for t in (v, u))
    top = corner(0, 0) * (1 - fade_u) + corner(0, 1) * fade_u
    bottom = corner(1, 0) * (1 - fade_u) + corner(1, 1) * fade_u
    return np.sqrt(2) * (top * (1 - fade_v) + bottom * fade_v)


# Contents: (image, rng) -> [H, W, 3] in 0..255, the whole image; the shape cuts out its part.


def _elastic(image: np.ndarray, rng: Generator) -> np.ndarray:
    height, width = image.shape[:2]
    reach = rng.uniform(0.02, 0.08) * min(height, width)
    y, x = np.indices((height, width), np.float32)
    x, y = (axis + np.float32(reach) * _perlin(height, width, rng).astype(np.float32) for axis in (x, y))
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _texture(image: np.ndarray, rng: Generator) -> np.ndarray:
    """A foreign texture: stripes, clouds or speckles between two colours."""
    height, width = image.shape[:2]
    kind, one, two = rng.integers(3), *rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if kind == 0:
        y, x = np.indices((height, width), np.float32)
        wave = rng.uniform(4, 40, 2) * rng.choice([-1, 1], 2) * 2 * np.pi / (width, height)
        mix = 0.5 + 0.5 * np.sin(wave[0] * x + wave[1] * y)
    else:
        mix = 0.5 + 0.5 * _perlin(height, width, rng) if kind == 1 else rng.random((height, width), np.float32)
    return one + mix[..., None].astype(np.float32) * (two - one)


def _elsewhere(image: np.ndarray, rng: Generator) -> np.ndarray:
    shift = [int(rng.integers(n // 8, n - n // 8)) for n in image.shape[:2]]
    return np.roll(image, shift, (0, 1))


def _colour(image: np.ndarray, rng: Generator) -> np.ndarray:
    return np.clip(image * rng.uniform(0.6, 1.4, 3) + rng.uniform(-60, 60, 3), 0, 255)


def _blur(image: np.ndarray, rng: Generator) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.008, 0.03) * min(image.shape[:2]))


_SHAPES = {"stain": _stain, "perlin": _perlin_shape, "rectangle": _rectangle, "line": _line}
_CONTENTS = {"elastic": _elastic, "texture": _texture, "elsewhere": _elsewhere, "colour": _colour, "blur": _blur}
