"""Draws the chart of a recognition: the distance of each class at each timestep, relative to the recognised class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from model.png import encode_png
from model.recognition import SMALLEST_ERROR, Recognition

WIDTH, HEIGHT = 640, 400
LEFT, TOP, BOTTOM = 60, 44, 50  # margins in pixels
LEAST_RIGHT, NAME_MARGIN = 50, 24  # the right margin is wide enough for the names
FONT_SIZE = 13
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#c9a227", "#b07aa1", "#ff7f8e", "#9c755f", "#79706e")
BACKGROUND, TEXT, GRID = "white", "#222222", "#dddddd"
NUM_TICKS = 4
LARGEST = 1.0  # the largest excess on the chart; points above it are drawn at its upper edge
LABEL_DISTANCE = 14  # smallest vertical distance of two labels in pixels

MOST_CURVES = 12  # the most probable classes are drawn
MOST_CHARACTERS = 16  # of a name

Curves = dict[int, list[tuple[int, float]]]


def excess_by_class(recognition: Recognition) -> Curves:
    """Returns the points (t, excess) of each class, in order of t.

    The excess is the mean distance between the image and the prediction of the class at t, divided by the distance of
    the recognised class, minus 1. A dropped class has points only for the pairs before it was dropped.
    """
    values: dict[int, dict[int, list[float]]] = {}
    for t, errors in zip(recognition.timesteps, recognition.errors, strict=False):
        own = math.sqrt(max(errors[recognition.label], SMALLEST_ERROR))
        for label, error in errors.items():
            values.setdefault(label, {}).setdefault(t, []).append(math.sqrt(error) / own - 1)
    return {label: [(t, sum(v) / len(v)) for t, v in sorted(at.items())] for label, at in sorted(values.items())}


@dataclass(frozen=True, slots=True)
class _Axes:
    """The ranges of both axes, and the right end of the chart in pixels."""

    t: tuple[int, int]
    excess: tuple[float, float]
    right: float

    @classmethod
    def of(cls, curves: Curves, right: float) -> "_Axes":
        timesteps = [t for points in curves.values() for t, _ in points]
        excesses = [min(excess, LARGEST) for points in curves.values() for _, excess in points]
        low, high = min(timesteps), max(timesteps)
        return cls((low, max(high, low + 1)), (min(0.0, *excesses), max(0.01, *excesses)), right)

    def place(self, t: float, excess: float) -> tuple[float, float]:
        """Returns the pixel of a point."""
        x, y = (
            (value - low) / (high - low) for value, (low, high) in ((t, self.t), (min(excess, LARGEST), self.excess))
        )
        return LEFT + x * (self.right - LEFT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def encode_error_chart(recognition: Recognition, class_names: Sequence[str], text: Mapping[str, str]) -> bytes:
    """Returns the chart as a PNG file with these text chunks."""
    probabilities, font = recognition.probabilities, ImageFont.load_default(FONT_SIZE)
    curves = excess_by_class(recognition)
    chosen = sorted(curves, key=lambda label: (label != recognition.label, -probabilities[label]))[:MOST_CURVES]
    curves, names = {label: curves[label] for label in sorted(chosen)}, [_shortened(name) for name in class_names]
    widest = max(font.getlength(names[label]) for label in curves)
    right = WIDTH - max(LEAST_RIGHT, math.ceil(widest) + NAME_MARGIN)
    axes, image = _Axes.of(curves, right), Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    probability = max(probabilities)
    title = (
        f"Recognised as {names[recognition.label]} ({probability:.1%}). Distance of each class, relative to this class"
    )
    draw.text((LEFT, 14), title, TEXT, font)
    draw.text((LEFT + (right - LEFT) / 2, HEIGHT - 14), "timestep t", TEXT, font, anchor="mm")
    decimals = 0 if axes.excess[1] - axes.excess[0] >= 0.01 * NUM_TICKS else 1
    for i in range(NUM_TICKS + 1):
        t, excess = (low + (high - low) * i / NUM_TICKS for low, high in (axes.t, axes.excess))
        (x, _), (_, y) = axes.place(t, 0.0), axes.place(axes.t[0], excess)
        draw.line((LEFT, y, right, y), GRID)
        draw.text((LEFT - 8, y), f"{excess:+.{decimals}%}", TEXT, font, anchor="rm")
        draw.text((x, HEIGHT - BOTTOM + 14), f"{t:.0f}", TEXT, font, anchor="mm")
    for label, points in curves.items():
        colour, width = COLOURS[label % len(COLOURS)], 4 if label == recognition.label else 2
        corners = [axes.place(*point) for point in points]
        draw.line(corners, colour, width)
        for x, y in corners:
            draw.ellipse((x - width, y - width, x + width, y + width), colour)
    lowest = math.inf
    for (x, y), label in sorted(
        ((axes.place(*points[-1]), label) for label, points in curves.items()), reverse=True, key=lambda end: end[0][1]
    ):
        lowest = min(y, lowest - LABEL_DISTANCE)
        draw.text((x + 10, lowest), names[label], COLOURS[label % len(COLOURS)], font, anchor="lm")
    return encode_png(image, text=text)


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_CHARACTERS else f"{name[:MOST_CHARACTERS]}..."
