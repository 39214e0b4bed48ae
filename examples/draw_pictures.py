"""Draws 12 kinds of small colour pictures, as a folder to try `scripts.train --data` with.

Install: pip install pillow
Run:     python examples/draw_pictures.py pictures

It makes the folders pictures/circle, pictures/fish and so on, with 500 PNG files of 32 x 32 pixels each. Colours,
angle, size and place are random, and the same seed draws the same pictures.
"""

import argparse
import colorsys
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, FINE = 32, 6  # pixels of a picture; it is drawn FINE times as large, and then reduced
Point = tuple[float, float]
Colour = tuple[int, int, int]


class Pen:
    """Draws in a square from -1 to 1, which is turned, scaled and shifted at random."""

    def __init__(self, image: Image.Image, choose: random.Random) -> None:
        self._draw, self._side = ImageDraw.Draw(image), image.width
        self._angle, self._scale = math.radians(choose.uniform(-20, 20)), choose.uniform(0.6, 0.85)
        self._shift = choose.uniform(-0.12, 0.12), choose.uniform(-0.12, 0.12)

    def polygon(self, points: Iterable[Point], colour: Colour) -> None:
        self._draw.polygon([self._place(*point) for point in points], fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour, *, height: float = 1.0) -> None:
        angles = [math.tau * step / 48 for step in range(48)]
        self.polygon([(x + radius * math.cos(a), y + radius * height * math.sin(a)) for a in angles], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def _place(self, x: float, y: float) -> Point:
        cos, sin = math.cos(self._angle), math.sin(self._angle)
        turned = x * cos - y * sin + self._shift[0], x * sin + y * cos + self._shift[1]
        return tuple((1 + self._scale * value) * self._side / 2 for value in turned)  # type: ignore[return-value]


def star(radius: float, inner: float, num_points: int) -> list[Point]:
    angles = [math.pi * step / num_points - math.pi / 2 for step in range(2 * num_points)]
    radii = [inner if step % 2 else radius for step in range(2 * num_points)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True)]


def heart() -> list[Point]:
    angles = [math.tau * step / 60 for step in range(60)]
    wave = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -y / 16) for a, y in zip(angles, wave, strict=True)]


def fish(pen: Pen, colour: Colour, other: Colour) -> None:
    pen.polygon([(0.4, 0), (1, -0.5), (1, 0.5)], other)
    pen.disc(-0.2, 0, 0.75, colour, height=0.6)
    pen.disc(-0.6, -0.12, 0.09, (20, 20, 20))


def flower(pen: Pen, colour: Colour, other: Colour) -> None:
    for step in range(6):
        angle = math.tau * step / 6
        pen.disc(0.58 * math.cos(angle), 0.58 * math.sin(angle), 0.36, colour)
    pen.disc(0, 0, 0.33, other)


def tree(pen: Pen, colour: Colour, other: Colour) -> None:
    pen.box(-0.15, 0.3, 0.15, 1, other)
    for x, y in ((-0.4, -0.05), (0.4, -0.05), (0, -0.5)):
        pen.disc(x, y, 0.48, colour)


def house(pen: Pen, colour: Colour, other: Colour) -> None:
    pen.box(-0.7, -0.1, 0.7, 0.9, colour)
    pen.polygon([(-0.95, -0.1), (0, -0.95), (0.95, -0.1)], other)
    pen.box(-0.15, 0.35, 0.2, 0.9, other)


def moon(pen: Pen, colour: Colour, other: Colour) -> None:
    shares = [step / 40 for step in range(41)]
    outer = [(math.cos(a), math.sin(a)) for a in (math.pi * (0.3 + 1.4 * share) for share in shares)]
    inner = [(0.35 + 0.75 * math.cos(a), 0.82 * math.sin(a)) for a in (math.pi * (1.63 - 1.26 * s) for s in shares)]
    pen.polygon([*outer, *inner], colour)


def cup(pen: Pen, colour: Colour, other: Colour) -> None:
    pen.disc(0.6, 0, 0.42, other)
    pen.disc(0.6, 0, 0.2, (240, 240, 240))
    pen.polygon([(-0.8, -0.7), (0.6, -0.7), (0.45, 0.8), (-0.65, 0.8)], colour)


def mushroom(pen: Pen, colour: Colour, other: Colour) -> None:
    pen.box(-0.25, 0, 0.25, 0.9, (235, 225, 205))
    pen.polygon([(math.cos(a), -0.85 * math.sin(a) + 0.1) for a in (math.pi * step / 30 for step in range(31))], colour)
    for x, y in ((-0.45, -0.2), (0.1, -0.45), (0.5, -0.1)):
        pen.disc(x, y, 0.13, other)


KINDS: dict[str, Callable[[Pen, Colour, Colour], None]] = {
    "circle": lambda pen, colour, other: pen.disc(0, 0, 0.9, colour),
    "cup": cup,
    "fish": fish,
    "flower": flower,
    "heart": lambda pen, colour, other: pen.polygon(heart(), colour),
    "house": house,
    "moon": moon,
    "mushroom": mushroom,
    "square": lambda pen, colour, other: pen.box(-0.75, -0.75, 0.75, 0.75, colour),
    "star": lambda pen, colour, other: pen.polygon(star(1, 0.42, 5), colour),
    "tree": tree,
    "triangle": lambda pen, colour, other: pen.polygon([(0, -0.95), (0.95, 0.8), (-0.95, 0.8)], colour),
}


def draw(kind: str, choose: random.Random) -> Image.Image:
    hue = choose.random()
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), shade(hue + 0.5, 0.25, choose.uniform(0.75, 1)))
    colour, other = shade(hue, 0.85, 0.8), shade(hue + choose.uniform(0.12, 0.3), 0.9, 0.6)
    KINDS[kind](Pen(image, choose), colour, other)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def shade(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))  # type: ignore[return-value]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(number)
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--count", type=positive, default=500, help="pictures of each kind; default: 500")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for kind in KINDS:
        choose, folder = random.Random(f"{args.seed} {kind}"), args.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(args.count):
            draw(kind, choose).save(folder / f"{number:04d}.png")
    print(f"wrote {args.folder}: {args.count} pictures of each of {len(KINDS)} kinds")


if __name__ == "__main__":
    main()
