"""Digits that imitate the mouse drawings of two people: a pen of constant width along a few jagged curves."""

import random

from PIL import Image, ImageDraw

Point = tuple[float, float]
Stroke = tuple[Point, ...]

HEIGHT = 500  # pixels of the mask
ASPECT = 0.65  # width / height of a digit
JITTER = 0.025  # standard deviation of the displacement of a point, as a share of the height
TREMOR = 0.006  # the same, for each sample of the mouse position
SAMPLES = 6  # samples of the mouse position between two points
# Points of the strokes: x to the right and y downwards, from 0 to 1. A point that is repeated is a corner.
STYLES: dict[str, tuple[tuple[Stroke, ...], ...]] = {
    "mouse-round": (
        (((0.5, 0), (0.15, 0.2), (0.08, 0.55), (0.3, 0.95), (0.6, 0.98), (0.88, 0.65), (0.85, 0.25), (0.52, 0.02)),),
        (((0.3, 0.22), (0.55, 0), (0.55, 0), (0.53, 0.5), (0.5, 1)),),
        (
            (
                *((0.1, 0.25), (0.35, 0.02), (0.75, 0.1), (0.75, 0.4), (0.4, 0.75), (0.08, 1), (0.08, 1)),
                *((0.5, 0.97), (0.95, 0.98)),
            ),
        ),
        (
            (
                *((0.12, 0.12), (0.5, 0), (0.85, 0.2), (0.65, 0.42), (0.4, 0.48), (0.4, 0.48)),
                *((0.75, 0.52), (0.9, 0.78), (0.55, 1), (0.08, 0.9)),
            ),
        ),
        (
            ((0.4, 0), (0.25, 0.3), (0.08, 0.6), (0.08, 0.6), (0.5, 0.62), (0.95, 0.6)),
            ((0.7, 0.25), (0.68, 0.6), (0.66, 1)),
        ),
        (
            ((0.3, 0.03), (0.22, 0.42), (0.22, 0.42), (0.6, 0.36), (0.88, 0.62), (0.7, 0.93), (0.35, 1), (0.08, 0.9)),
            ((0.3, 0.03), (0.6, 0.03), (0.85, 0.02)),
        ),
        (
            (
                *((0.75, 0.02), (0.4, 0.22), (0.15, 0.6), (0.25, 0.95), (0.6, 1), (0.85, 0.78), (0.65, 0.55)),
                *((0.3, 0.6), (0.17, 0.75)),
            ),
        ),
        (((0.08, 0.06), (0.5, 0.04), (0.92, 0.05), (0.92, 0.05), (0.65, 0.45), (0.4, 1)),),
        (
            (
                *((0.8, 0.15), (0.5, 0), (0.2, 0.15), (0.4, 0.42), (0.75, 0.62), (0.8, 0.88), (0.5, 1)),
                *((0.2, 0.88), (0.25, 0.62), (0.6, 0.4), (0.82, 0.15)),
            ),
        ),
        (
            (
                *((0.82, 0.2), (0.5, 0.02), (0.18, 0.2), (0.25, 0.45), (0.6, 0.45), (0.83, 0.2), (0.83, 0.2)),
                *((0.8, 0.6), (0.7, 1)),
            ),
        ),
    ),
    "mouse-quick": (
        (
            (
                *((0.85, 0.3), (0.6, 0.02), (0.2, 0.12), (0.05, 0.5), (0.2, 0.9), (0.55, 1), (0.9, 0.75)),
                *((0.92, 0.4), (0.75, 0.1)),
            ),
        ),
        (((0.6, 0), (0.5, 0.5), (0.42, 1)),),
        (
            (
                *((0.15, 0.2), (0.5, 0), (0.82, 0.2), (0.65, 0.55), (0.3, 0.9), (0.12, 0.95), (0.15, 0.8)),
                *((0.4, 0.85), (0.7, 1), (0.95, 0.92)),
            ),
        ),
        (
            (
                *((0.1, 0.03), (0.45, 0.04), (0.8, 0.03), (0.8, 0.03), (0.42, 0.4), (0.42, 0.4)),
                *((0.8, 0.5), (0.85, 0.8), (0.5, 1), (0.08, 0.9)),
            ),
        ),
        (((0.65, 1), (0.66, 0.5), (0.65, 0), (0.65, 0), (0.3, 0.4), (0.05, 0.7), (0.05, 0.7), (0.5, 0.7), (1, 0.7)),),
        (
            (
                *((0.85, 0.02), (0.25, 0.05), (0.25, 0.05), (0.2, 0.45), (0.2, 0.45)),
                *((0.65, 0.42), (0.85, 0.7), (0.6, 0.97), (0.1, 0.95)),
            ),
        ),
        (((0.65, 0), (0.3, 0.35), (0.1, 0.7), (0.35, 1), (0.8, 0.9), (0.8, 0.65), (0.5, 0.55), (0.15, 0.75)),),
        (
            ((0.05, 0.05), (0.5, 0.04), (0.95, 0.02), (0.95, 0.02), (0.6, 0.5), (0.45, 1)),
            ((0.3, 0.52), (0.6, 0.5), (0.9, 0.47)),
        ),
        (
            (
                *((0.5, 0.45), (0.2, 0.3), (0.35, 0.02), (0.7, 0.03), (0.8, 0.28), (0.5, 0.45), (0.12, 0.7)),
                *((0.3, 1), (0.75, 0.98), (0.88, 0.7), (0.5, 0.45)),
            ),
        ),
        (
            (
                *((0.8, 0.12), (0.4, 0.02), (0.12, 0.25), (0.35, 0.5), (0.75, 0.35), (0.82, 0.1), (0.82, 0.1)),
                *((0.85, 0.5), (0.8, 0.8), (0.5, 1), (0.15, 0.9)),
            ),
        ),
    ),
}


def draw_digit(digit: int, style: str, generator: random.Random) -> Image.Image:
    """Returns the mask of a digit (255 is ink), cropped to it. Every call draws it a little differently."""
    width = generator.uniform(0.04, 0.09) * HEIGHT
    border = HEIGHT // 4  # room for displaced points
    mask = Image.new("L", (round(HEIGHT * ASPECT) + 2 * border, HEIGHT + 2 * border))
    pen = ImageDraw.Draw(mask)
    for stroke in STYLES[style][digit]:
        path = [
            (
                border + HEIGHT * (ASPECT * x + generator.gauss(0, TREMOR)),
                border + HEIGHT * (y + generator.gauss(0, TREMOR)),
            )
            for x, y in _sample(_displace(stroke, generator))
        ]
        pen.line(path, fill=255, width=round(width), joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return mask.crop(mask.getbbox())


def _displace(stroke: Stroke, generator: random.Random) -> Stroke:
    """Moves every point a little. Both points of a corner move together."""
    moved = {point: (point[0] + generator.gauss(0, JITTER), point[1] + generator.gauss(0, JITTER)) for point in stroke}
    return tuple(moved[point] for point in stroke)


def _sample(stroke: Stroke) -> list[Point]:
    """Returns samples of the Catmull-Rom spline through the points. It is not smooth at corners."""
    path = [stroke[0]]
    for i in range(len(stroke) - 1):
        p_1, p_2 = stroke[i], stroke[i + 1]
        if p_1 == p_2:
            continue
        p_0, p_3 = stroke[max(i - 1, 0)], stroke[min(i + 2, len(stroke) - 1)]
        path += [_spline((p_0, p_1, p_2, p_3), k / SAMPLES) for k in range(1, SAMPLES + 1)]
    return path


def _spline(points: tuple[Point, Point, Point, Point], u: float) -> Point:
    x, y = (
        (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3) / 2
        for a, b, c, d in zip(*points, strict=True)
    )
    return x, y
