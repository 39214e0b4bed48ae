"""A fixed set of digit sketches, drawn by a model of a hand that moves a mouse. They are inputs for the edit task.

Each digit has several styles. A style is a list of strokes, and a stroke is a list of points of a skeleton. The model
distorts the skeleton, adds the wobble of a mouse, and draws the strokes with a round pen on a large canvas. No image of
MNIST is used.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

import numpy as np
import torch
from torch import Tensor

from scripts.common.mnist import NUM_CLASSES

Point = tuple[float, float]

CANVAS = 280  # side of the canvas in pixels, as in a web page
MARGIN = 40  # space in pixels around an undistorted digit
SEED = 25  # of the published figures
PEN_WIDTHS = (17.0, 27.0)  # pixels of the canvas
ROTATION, SHEAR, STRETCH = 6.0, 0.12, 0.1  # standard deviations: degrees, and shares of the size
BEND = 0.02  # standard deviation of the position of each point of a skeleton, as a share of the size
WOBBLE, WOBBLE_LENGTH = 2.2, 5  # slow wobble: standard deviation in pixels, and number of mouse events it lasts
TREMOR = 0.6  # standard deviation of the error of each mouse event, in pixels
ASPECT = 0.72  # width of a digit as a share of its height
CURVE_STEPS = 12  # points of the curve between two points of the skeleton
EVENT_DISTANCE = 7.0  # distance between two mouse events in pixels

# Strokes are separated by " / ". The points x,y of a stroke are percentages of the size, x to the right and y down. A
# smooth curve goes through them. A repeated point makes a corner.
STYLES: dict[int, tuple[str, ...]] = {
    0: (
        "52,0 22,12 10,50 24,88 50,100 78,86 90,50 76,12 50,0",
        "62,4 34,6 18,45 26,88 48,100 72,82 80,42 70,10 50,0",
        "40,3 16,25 12,65 36,97 70,92 88,60 84,22 60,0 36,6",
    ),
    1: (
        "50,0 50,50 50,100",
        "30,24 42,12 53,0 53,0 52,50 52,100",
        "28,22 40,12 50,0 50,0 50,50 50,100 / 25,100 50,100 76,100",
        "62,0 50,50 40,100",
    ),
    2: (
        "16,24 28,6 52,0 78,10 80,32 56,62 14,100 14,100 50,100 88,99",
        "18,20 40,1 70,6 76,32 52,70 26,96 10,90 24,78 50,92 90,96",
        "12,14 40,2 74,8 82,28 62,58 34,84 16,100 16,100 54,96 86,100",
    ),
    3: (
        "18,14 44,0 74,10 74,34 42,47 42,47 78,56 84,80 56,100 14,90",
        "20,4 50,3 80,2 80,2 60,22 42,42 42,42 74,50 84,74 60,97 16,92",
        "20,20 40,2 70,8 74,30 50,46 36,48 60,48 84,66 76,92 44,100 16,84",
    ),
    4: (
        "20,0 16,30 14,56 14,56 50,56 86,54 / 70,6 68,50 66,100",
        "62,0 36,32 10,64 10,64 50,64 92,64 / 64,0 64,50 64,100",
        "22,2 14,34 28,54 56,50 76,36 / 78,0 74,50 70,100",
    ),
    5: (
        "80,0 50,0 24,2 24,2 20,22 18,42 18,42 50,36 80,50 82,78 54,100 14,92",
        "26,2 24,22 22,42 22,42 56,40 80,60 70,90 42,100 14,90 / 26,2 54,2 84,0",
        "84,4 56,2 34,6 26,24 24,44 52,46 76,62 70,88 44,100 16,94",
    ),
    6: (
        "70,0 42,16 20,50 18,80 42,100 74,92 80,68 56,52 28,62 18,78",
        "48,0 30,30 22,64 30,94 56,100 78,82 66,60 42,60 25,74",
        "80,8 54,2 28,26 18,64 32,94 62,98 82,76 68,54 40,54 22,68",
    ),
    7: (
        "14,4 50,3 84,2 84,2 62,46 40,100",
        "14,4 50,4 86,2 86,2 62,48 44,100 / 32,52 56,50 80,48",
        "16,20 18,6 18,6 50,6 82,4 82,4 70,40 60,100",
    ),
    8: (
        "76,14 50,0 24,14 30,36 60,54 80,76 66,97 36,98 20,78 38,54 68,36 78,16",
        "50,0 26,10 28,36 50,47 72,36 74,10 50,0 / 50,47 22,60 22,88 50,100 78,88 78,60 50,47",
        "50,46 26,26 38,2 66,4 74,26 50,46 22,70 34,97 64,100 80,76 50,46",
    ),
    9: (
        "76,20 52,0 24,14 20,38 46,50 74,34 78,16 78,16 76,60 72,100",
        "76,14 48,0 22,20 32,46 62,44 78,16 78,16 78,60 64,94 28,96",
        "70,10 40,4 22,28 40,50 68,34 74,8 74,8 64,54 46,100",
    ),
}


def draw_sketches(per_digit: int, *, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Returns sketches (10 * per_digit, CANVAS, CANVAS) uint8, white on black, and their digits (10 * per_digit,).

    The styles of a digit are used in turn. The result depends only on the arguments. Sketch i of a digit is the same
    for every `per_digit`.
    """
    keys = [(digit, i) for digit in range(NUM_CLASSES) for i in range(per_digit)]
    sketches = [draw_sketch(STYLES[digit][i % len(STYLES[digit])], Random(f"{seed}/{digit}/{i}")) for digit, i in keys]
    return torch.stack(sketches), torch.tensor([digit for digit, _ in keys])


def draw_sketch(style: str, random: Random) -> Tensor:
    """Returns one sketch (CANVAS, CANVAS) uint8 of a distorted style, with white strokes on black."""
    width, distort = random.uniform(*PEN_WIDTHS), _distortion(random)
    paths = []
    for stroke in style.split(" / "):
        points = [_point(text) for text in stroke.split()]
        bent = {(x, y): (x + random.gauss(0, BEND), y + random.gauss(0, BEND)) for x, y in points}
        curve = [distort(point) for point in _curve([bent[point] for point in points])]
        paths.append(_wobble(_mouse_events(curve), random))
    return _render(paths, width)


def _point(text: str) -> Point:
    x, y = text.split(",")
    return int(x) / 100, int(y) / 100


def _distortion(random: Random) -> Callable[[Point], Point]:
    """Returns a random affine map from the unit square to the canvas."""
    angle, shear = math.radians(random.gauss(0, ROTATION)), random.gauss(0, SHEAR)
    stretch_x, stretch_y = math.exp(random.gauss(0, STRETCH)), math.exp(random.gauss(0, STRETCH))
    size = CANVAS - 2 * MARGIN

    def distort(point: Point) -> Point:
        x, y = (point[0] - 0.5) * ASPECT * stretch_x, (point[1] - 0.5) * stretch_y
        x -= shear * y
        x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
        return CANVAS / 2 + size * x, CANVAS / 2 + size * y

    return distort


def _curve(points: Sequence[Point]) -> list[Point]:
    """Returns closely spaced points of a smooth curve through the points of a stroke."""
    padded = [points[0], *points, points[-1]]
    curve = [points[0]]
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        if p1 != p2:  # a repeated point is a corner
            curve += [_catmull_rom(p0, p1, p2, p3, (i + 1) / CURVE_STEPS) for i in range(CURVE_STEPS)]
    return curve


def _catmull_rom(p0: Point, p1: Point, p2: Point, p3: Point, u: float) -> Point:
    """Returns the point at u in 0..1 between p1 and p2 (Catmull & Rom 1974, tension 1/2)."""
    x, y = (
        0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)
        for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
    )
    return x, y


def _mouse_events(curve: Sequence[Point]) -> list[Point]:
    """Returns points of the curve at nearly equal distances, as a mouse with constant speed reports them."""
    events, travelled = [curve[0]], 0.0
    for a, b in pairwise(curve):
        travelled += math.dist(a, b)
        if travelled >= EVENT_DISTANCE:
            events.append(b)
            travelled = 0.0
    return [*events, curve[-1]]


def _wobble(events: Sequence[Point], random: Random) -> list[Point]:
    """Adds a slow wobble, which is correlated between events, and an independent error of each event."""
    keep = math.exp(-1 / WOBBLE_LENGTH)
    drift = [random.gauss(0, WOBBLE), random.gauss(0, WOBBLE)]
    moved = []
    for x, y in events:
        drift = [keep * d + math.sqrt(1 - keep**2) * random.gauss(0, WOBBLE) for d in drift]
        moved.append((x + drift[0] + random.gauss(0, TREMOR), y + drift[1] + random.gauss(0, TREMOR)))
    return moved


def _render(paths: Sequence[Sequence[Point]], width: float) -> Tensor:
    """Draws the paths with a round pen. Pixels at the edge of a stroke are grey in proportion to their coverage."""
    reach = width / 2 + 1
    distance = np.full((CANVAS, CANVAS), reach)  # from the centre of each pixel to the nearest path
    for path in paths:
        for (x1, y1), (x2, y2) in pairwise(path):
            left, right = (max(int(bound), 0) for bound in (min(x1, x2) - reach, max(x1, x2) + reach))
            top, bottom = (max(int(bound), 0) for bound in (min(y1, y2) - reach, max(y1, y2) + reach))
            window = distance[top : bottom + 1, left : right + 1]  # the pixels that the pen can reach
            y, x = np.indices(window.shape) + np.array([top + 0.5, left + 0.5])[:, None, None]
            dx, dy = x2 - x1, y2 - y1
            u = np.clip(((x - x1) * dx + (y - y1) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            np.minimum(window, np.hypot(x - x1 - u * dx, y - y1 - u * dy), out=window)
    ink = np.clip(width / 2 - distance + 0.5, 0, 1)
    return torch.from_numpy((255 * ink).round().astype(np.uint8))
