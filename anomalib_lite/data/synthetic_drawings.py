"""The synthetic set's images: two textures and two objects, each with several kinds of defect.

A defective image is drawn twice from the same random numbers, with and without its defect. The mask marks where the
drawings differ; light and noise are added later. Points and lengths are shares of the image's side, colours in [0, 1].
"""

import cv2
import numpy as np
from numpy.random import Generator, default_rng

VISIBLE = 0.035  # difference of the two drawings above which a pixel belongs to the mask
MIN_AREA = 0.0012  # smallest area of a mask, as a share of the image


def _rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _noise(rng: Generator, size: int, rows: int, cols: int) -> np.ndarray:
    """Smooth noise [size, size] of about unit variance, interpolated from rows × cols random values."""
    return cv2.resize(rng.standard_normal((rows, cols), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma * image.shape[0]).reshape(image.shape)


def _cover(size: int, points: np.ndarray) -> np.ndarray:
    """How much of each pixel the polygon covers, [size, size, 1]."""
    cover = np.zeros((size, size), np.uint8)
    cv2.fillPoly(cover, [np.round(points * size * 256).astype(np.int32)], 255, cv2.LINE_AA, shift=8)
    return cover[..., None].astype(np.float32) / 255


def _polar(angle: np.ndarray | float, radius: np.ndarray | float) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _circle(at: tuple[float, float] | np.ndarray, radius: float) -> np.ndarray:
    return _polar(np.linspace(0, 2 * np.pi, 64, endpoint=False), radius) + np.asarray(at)


def _box(at: tuple[float, float] | np.ndarray, width: float, height: float) -> np.ndarray:
    return np.asarray(at) + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]


def _place(points: np.ndarray, angle: float, shift: np.ndarray) -> np.ndarray:
    """Rotate points about the origin, then shift them."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + shift


def _blob(rng: Generator, at: np.ndarray, radius: float) -> np.ndarray:
    """The outline of an irregular patch: a circle whose radius is a random Fourier series."""
    angle, order = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.arange(2, 7)[:, None]
    waves = rng.normal(0, 0.35, (5, 1)) / order * np.cos(order * angle + rng.uniform(0, 2 * np.pi, (5, 1)))
    return _polar(angle, radius * np.clip(1 + waves.sum(0), 0.4, 1.8)) + at


def _tint(image: np.ndarray, rng: Generator, at: np.ndarray, radius: float, tint, where=1.0) -> np.ndarray:
    """Multiply an irregular patch of the image by a tint."""
    cover = _blur(_cover(len(image), _blob(rng, at, radius)), 0.004) * where
    return image * (1 - cover * (1 - np.asarray(tint, np.float32)))


def _scratch(image: np.ndarray, rng: Generator, at: np.ndarray, length, width, heading, bend, colour, where=1.0):
    """Draw a curved line with pointed ends and a shadow at its lower right."""
    t = np.linspace(-1, 1, 40)
    way = heading + bend * t + 0.4 * bend * np.sin(rng.uniform(2, 5) * t + rng.uniform(0, 6))
    middle = np.cumsum(_polar(way, length / len(t)), 0)
    side = _polar(way + np.pi / 2, width / 2 * (1 - t**8) * rng.uniform(0.6, 1.2, len(t)))
    points = np.concatenate([middle + side, (middle - side)[::-1]]) - middle[20] + at
    image = image * (1 - 0.4 * where * _blur(_cover(len(image), points + 0.005), 0.003))
    return image + where * _cover(len(image), points) * (colour - image)


class _Canvas:
    """Colour [S, S, 3] and height [S, S, 1] of flat parts seen from above, rotated and shifted about the centre."""

    def __init__(self, size: int, ground: np.ndarray, angle: float, shift: np.ndarray):
        self.size, self.angle, self.shift = size, angle, shift + 0.5
        self.colour = np.array(np.broadcast_to(ground, (size, size, 3)), np.float32)
        self.height = np.zeros((size, size, 1), np.float32)

    def paint(self, points: np.ndarray, colour, height: float) -> None:
        points = _place(points, self.angle, self.shift)
        low = np.clip(points.min(0) * self.size - 2, 0, self.size).astype(int)
        high = np.clip(points.max(0) * self.size + 3, 0, self.size).astype(int)
        box = np.s_[low[1] : high[1], low[0] : high[0]]  # painting in a box is faster: most parts are small
        cover, field = _cover(self.size, points)[box], np.broadcast_to(colour, self.colour.shape)[box]
        self.colour[box] += cover * (field - self.colour[box])
        self.height[box] += cover * (height - self.height[box])

    def shade(self) -> np.ndarray:
        """The image: edges that face the light (upper left) are bright, low places beside high ones lie in shadow."""
        bevel = _blur(self.height, 0.004)[..., 0]
        slope = -0.7 * (cv2.Sobel(bevel, -1, 1, 0) + cv2.Sobel(bevel, -1, 0, 1))
        shadow = np.clip(_blur(self.height, 0.015) - self.height, 0, 1)
        return self.colour * (1 + 0.12 * np.clip(slope, -3, 3)[..., None]) * (1 - 0.6 * shadow)


# The categories: draw(rng, size, defect, spoil) -> float [S, S, C]. Only the defect uses `spoil`, so that `rng` draws
# the same part with and without a defect.


def _fabric(rng: Generator, size: int, defect: str | None, spoil: Generator) -> np.ndarray:
    """A grey 2/2 twill weave."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    at, threads = spoil.uniform(0.2, 0.8, 2), 34
    u = threads * (x + 0.003 * _noise(rng, size, 5, 5) + rng.uniform(-0.05, 0.05) * y) + rng.uniform(0, 4)
    v = threads * (y + 0.003 * _noise(rng, size, 5, 5) + rng.uniform(-0.05, 0.05) * x) + rng.uniform(0, 4)
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    step, tones = (i + j) % 4, rng.normal(0, 0.035, (2, 64))
    over = step < 2  # the warp lies on top
    along = np.where(over, step + v - j, step - 2 + u - i) / 2
    bulge = np.sin(np.pi * np.where(over, u - i, v - j)) ** 0.8 * (0.55 + 0.45 * np.sin(np.pi * along))
    plain = 0.24 + 0.4 * bulge + np.where(over, tones[0][i % 64], tones[1][j % 64])
    grain, cloud = _noise(rng, size, size // 2, size // 2), _noise(rng, size, 3, 3).clip(-1.8, 1.8)
    plain = plain * (1 + 0.06 * grain + 0.08 * cloud)
    if defect == "missing_thread":  # the warp shows through where the weft is gone
        gap = (j == int(at[1] * threads)) & (np.abs(u / threads - at[0]) < spoil.uniform(0.1, 0.25))
        plain = np.where(gap, 0.19 + 0.17 * np.sin(np.pi * (u - i)), plain)
    image = plain[..., None]
    if defect == "hole":
        image = _tint(image, spoil, at, spoil.uniform(0.024, 0.035), 0.45)
    if defect == "stain":
        image = _tint(image, spoil, at, spoil.uniform(0.04, 0.08), spoil.uniform(0.62, 0.73))
    if defect == "fibre":
        heading, bend = spoil.uniform(0, 2 * np.pi), spoil.uniform(0.5, 1.5)
        image = _scratch(image, spoil, at, spoil.uniform(0.15, 0.3), 0.011, heading, bend, spoil.uniform(0.55, 0.68))
    return image


def _wood(rng: Generator, size: int, defect: str | None, spoil: Generator) -> np.ndarray:
    """Planed softwood whose grain runs from top to bottom."""
    at, x = spoil.uniform(0.15, 0.85, 2), np.linspace(0, 1, size, dtype=np.float32)[None]
    rings = 11 * x + 0.9 * _noise(rng, size, 2, 5) + 0.25 * _noise(rng, size, 4, 14) + rng.uniform(0, 1)
    late, fibre = _blur((rings % 1.0) ** 2, 0.003), _noise(rng, size, size // 20, size // 2)
    pores = _blur((_noise(rng, size, size // 12, size) > 2.3).astype(np.float32), 0.002)
    shade = 0.75 * late + 0.13 * fibre + 0.2 * _noise(rng, size, 3, 6).clip(-2, 2) + 0.5 * pores
    image = _rgb(0.78, 0.60, 0.41) - shade[..., None] * _rgb(0.27, 0.28, 0.24)
    if defect == "hole":
        radius = spoil.uniform(0.018, 0.028)
        image = _tint(_tint(image, spoil, at, 1.35 * radius, 0.65), spoil, at, radius, 0.55)
    if defect == "scratch":
        heading, bend = spoil.uniform(-0.9, 0.9), spoil.uniform(-0.3, 0.3)
        image = _scratch(image, spoil, at, spoil.uniform(0.2, 0.4), 0.009, heading, bend, _rgb(0.79, 0.66, 0.5), 0.7)
    if defect in ("stain", "colour"):
        dyes = [_rgb(0.72, 0.66, 0.60)] if defect == "stain" else [_rgb(0.92, 0.68, 0.72), _rgb(0.70, 0.84, 1.0)]
        image = _tint(image, spoil, at, spoil.uniform(0.04, 0.08), dyes[spoil.integers(len(dyes))])
    return image


def _gear(rng: Generator, size: int, defect: str | None, spoil: Generator) -> np.ndarray:
    """A turned steel gear with 15 teeth and 5 holes on a dark mat."""
    mat = _rgb(0.20, 0.22, 0.25) * (1 + 0.08 * _noise(rng, size, size // 2, size // 2)[..., None])
    canvas = _Canvas(size, mat, rng.uniform(-0.12, 0.12), rng.uniform(-0.02, 0.02, 2))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - canvas.shift[::-1, None, None].astype(np.float32)
    lathe = np.interp(np.hypot(x, y) * 220, np.arange(220), rng.standard_normal(220))
    gloss = 1 + 0.03 * lathe + rng.uniform(0.06, 0.14) * np.cos(2 * (np.arctan2(y, x) - rng.uniform(0.5, 1.1)))
    steel = _rgb(0.58, 0.59, 0.60) * gloss[..., None].astype(np.float32) * rng.uniform(0.92, 1.08)
    tips, lean, tooth, hole = np.full(15, 0.395), np.zeros(15), spoil.integers(15), spoil.integers(5)
    if defect == "broken_tooth":
        tips[tooth] = spoil.uniform(0.338, 0.358)
    if defect == "bent_tooth":
        lean[tooth] = spoil.choice([-1, 1]) * spoil.uniform(0.25, 0.35)
    edges = np.array([-0.36, -0.19, 0.19, 0.36]) + lean[:, None] * [0, 1, 1, 0]
    reach = np.stack([np.full(15, 0.335), tips, tips + (tips < 0.39) * 0.012, np.full(15, 0.335)], 1)
    canvas.paint(_polar((np.arange(15)[:, None] + edges) * 2 * np.pi / 15, reach).reshape(-1, 2), steel, 1.0)
    canvas.paint(_circle((0, 0), 0.29), 0.9 * steel, 0.75)
    canvas.paint(_circle((0, 0), 0.15), steel, 1.0)
    for k in range(5):
        blocked = defect == "blocked_hole" and k == hole
        colour, height = (0.75 * steel, 0.55) if blocked else (mat, 0.0)
        canvas.paint(_circle(_polar(k * 2 * np.pi / 5, 0.22), 0.036), colour, height)
    for bore in (_circle((0, 0), 0.075), _box((0.075, 0), 0.05, 0.04)):
        canvas.paint(bore, mat, 0.0)
    image, metal = canvas.shade(), np.clip(canvas.height * 2 - 0.6, 0, 1)
    at = canvas.shift + _polar(spoil.uniform(0, 2 * np.pi), spoil.uniform(0.13, 0.29))
    if defect == "rust":
        grain = 0.1 * _noise(spoil, size, size // 4, size // 4)[..., None]
        image = _tint(image, spoil, at, spoil.uniform(0.03, 0.05), _rgb(0.78, 0.55, 0.4) + grain, metal)
    if defect == "scratch":
        heading, bend = spoil.uniform(0, 2 * np.pi), spoil.uniform(-0.4, 0.4)
        image = _scratch(image, spoil, at, spoil.uniform(0.12, 0.22), 0.008, heading, bend, 0.82, metal)
    return image


LOOKS = {"chip": _rgb(0.13, 0.13, 0.14), "bar": _rgb(0.30, 0.42, 0.60), "can": _rgb(0.70, 0.71, 0.73),
         "led": _rgb(0.80, 0.25, 0.20)}  # fmt: skip
PARTS = {  # positions relative to the board's centre, and rotations in quarter turns
    "chip": [(-0.14, -0.15, 0), (0.16, 0.12, 1)], "can": [(-0.26, 0.08, 0), (-0.25, 0.24, 0), (0.29, -0.2, 0)],
    "bar": [(0.13, -0.24, 0), (0.13, -0.16, 0), (0.13, -0.08, 0), (-0.05, 0.2, 1), (-0.13, 0.2, 1)],
    "led": [(0, 0.03, 0), (0.29, 0.29, 0)],
}  # fmt: skip
TRACES = [
    (-0.14, -0.07, -0.13, 0.14), (0.2, -0.24, 0.29, -0.2), (0.2, -0.16, 0.25, 0.03), (0.08, 0.12, 0.01, 0.05),
    (-0.26, 0, -0.21, -0.08), (0.22, 0.21, 0.29, 0.28), (-0.05, 0.28, 0.16, 0.32), (-0.25, 0.1, -0.25, 0.2),
]  # fmt: skip


def _part(kind: str, colour: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """The outlines, colours and heights of a part, relative to its centre."""
    solder, middle = _rgb(0.72, 0.72, 0.70), (0, 0)
    if kind == "bar":
        ends = [(_box((s * 0.038, 0), 0.02, 0.034), solder, 0.5) for s in (-1, 1)]
        return [*ends, (_box(middle, 0.06, 0.036), colour, 0.6), (_box(middle, 0.012, 0.036), 0.6 * colour, 0.6)]
    if kind == "chip":
        pins = [(_box((k * 0.022, s * 0.066), 0.009, 0.03), solder, 0.4) for k in range(-3, 4) for s in (-1, 1)]
        return [*pins, (_box(middle, 0.165, 0.115), colour, 0.9), (_circle((-0.06, 0.03), 0.009), 2 * colour, 0.85)]
    shape = _circle(middle, 0.046 if kind == "can" else 0.03)
    mark = shape[shape[:, 0] < 0.45 * shape[:, 0].min()]
    return [(shape, colour, 1.0), (0.85 * shape, 1.08 * colour, 0.95), (mark, 0.35 * colour, 0.95)]


def _board(rng: Generator, size: int, defect: str | None, spoil: Generator) -> np.ndarray:
    """A small circuit board on a table, rotated by a few degrees."""
    table = 0.62 + 0.012 * _noise(rng, size, size // 2, size // 2)[..., None]
    canvas = _Canvas(size, table, rng.uniform(-0.055, 0.055), rng.uniform(-0.018, 0.018, 2))
    green = _rgb(0.10, 0.33, 0.22) * rng.uniform(0.93, 1.07)
    canvas.paint(_box((0, 0), 0.78, 0.78), green, 0.4)
    for x0, y0, x1, y1 in TRACES:
        canvas.paint(_box(((x0 + x1) / 2, y0), abs(x1 - x0) + 0.008, 0.008), 1.45 * green, 0.42)
        canvas.paint(_box((x1, (y0 + y1) / 2), 0.008, abs(y1 - y0) + 0.008), 1.45 * green, 0.42)
    for corner in _box((0, 0), 0.68, 0.68):
        canvas.paint(_circle(corner, 0.026), _rgb(0.75, 0.65, 0.35), 0.42)
        canvas.paint(_circle(corner, 0.015), 0.7 * table, 0.1)
    places = [(kind, np.array([x, y]), quarter) for kind in PARTS for x, y, quarter in PARTS[kind]]
    chosen = spoil.integers(2) if defect == "solder_bridge" else spoil.integers(2, len(places))
    for number, (kind, at, quarter) in enumerate(places):
        spoilt, angle = defect if number == chosen else None, quarter * np.pi / 2
        for s in (-1, 1):
            canvas.paint(_place(_box((s * 0.035, 0), 0.03, 0.03), angle, at), _rgb(0.66, 0.62, 0.52), 0.43)
        angle, at = angle + rng.normal(0, 0.02), at + rng.normal(0, 0.0015, 2)
        tone = rng.uniform(0.93, 1.07) * rng.normal(1, 0.015, 3).astype(np.float32)
        if spoilt == "misplaced_part":
            angle += spoil.choice([-1, 1]) * spoil.uniform(0.3, 0.6)
            at = at + spoil.choice([-1, 1], 2) * spoil.uniform(0.008, 0.014, 2)
        if spoilt == "wrong_part":
            kind = str(spoil.choice([k for k in ("bar", "can", "led") if k != kind]))
        shapes = [] if spoilt == "missing_part" else _part(kind, LOOKS[kind] * tone)
        if spoilt == "solder_bridge":  # between two neighbouring pins
            pin = np.array([(spoil.integers(-3, 3) + 0.5) * 0.022, spoil.choice([-1, 1]) * 0.073])
            shapes.append((_blob(spoil, pin, 0.014), _rgb(0.76, 0.76, 0.74), 0.6))
        for points, colour, height in shapes:
            canvas.paint(_place(points, angle, at), colour, height)
    return canvas.shade()


CATEGORIES = {  # the position of a category is part of its images' seeds
    "fabric": (_fabric, ("fibre", "hole", "missing_thread", "stain")),
    "wood": (_wood, ("colour", "hole", "scratch", "stain")),
    "gear": (_gear, ("bent_tooth", "blocked_hole", "broken_tooth", "rust", "scratch")),
    "board": (_board, ("misplaced_part", "missing_part", "solder_bridge", "wrong_part")),
}


def _expose(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Add uneven light, white balance and noise; returns uint8."""
    y, x = np.mgrid[-1 : 1 : len(image) * 1j, -1 : 1 : len(image) * 1j].astype(np.float32)
    slope, dim = _polar(rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.15)), rng.uniform(0, 0.1)
    light = rng.uniform(0.9, 1.1) * (1 + slope[0] * x + slope[1] * y - dim * (x * x + y * y))
    image = image * light[..., None] * rng.normal(1, 0.012, image.shape[2])
    return np.clip(255 * (image + rng.normal(0, 0.012, image.shape)) + 0.5, 0, 255).astype(np.uint8)


def picture(category: str, defect: str | None, seed: int, size: int, split: int, index: int):
    """Return an image uint8 [S, S, 1 or 3], drawn from random numbers of its own, and its mask bool [S, S].

    With `defect` None the image shows the same part without a defect, and the mask is empty.
    """
    draw, key = CATEGORIES[category][0], (seed, list(CATEGORIES).index(category), split, index)
    clean = _blur(draw(default_rng(key), size, None, default_rng(0)).astype(np.float32), 0.002)
    image, mask, attempt = clean, np.zeros((size, size), bool), 0
    while defect and mask.mean() < MIN_AREA:  # a defect may change nothing: a scratch may lie in a gear's hole
        attempt += 1
        image = _blur(draw(default_rng(key), size, defect, default_rng((*key, attempt))).astype(np.float32), 0.002)
        changed = (np.abs(image - clean).max(2) > VISIBLE).astype(np.uint8)
        mask = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) > 0
    return _expose(image, default_rng((*key, 0))), mask
