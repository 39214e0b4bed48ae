"""Draws the letters A to Z in many fonts, as an .npz file to try `scripts.train --data` with.

Install: pip install numpy pillow && npm install --prefix examples/fonts
Run:     python examples/draw_letters.py examples/fonts letters.npz

Each picture has 28 x 28 grey pixels: a white letter on black, like the digits of MNIST. Font, rotation, bending and
thickness are random. The same fonts and the same seed draw the same pictures.
"""

import argparse
import math
import random
import string
import sys
from collections import defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_uppercase
SIDE, FINE = 28, 6  # pixels of a picture; it is drawn FINE times as large, and then reduced
CANVAS = SIDE * FINE
CELLS = 8  # a letter is bent in CELLS x CELLS pieces
FONT_FILES = "*-latin-[2-9]00-normal.woff"  # of Fontsource; fonts of other sources are .ttf or .otf files
Point = tuple[float, float]


class Bend:
    """A random distortion: rotation, slant, stretching and two waves."""

    def __init__(self, choose: random.Random) -> None:
        self._angle, self._slant = math.radians(choose.gauss(0, 5)), choose.gauss(0, 0.1)
        self._stretch = math.exp(choose.gauss(0, 0.08))
        self._waves = [(choose.gauss(0, 0.04), choose.uniform(1.5, 3.5), choose.uniform(0, math.tau)) for _ in range(2)]

    def source_of(self, x: float, y: float) -> Point:
        """Returns the point of the undistorted picture that is shown at (x, y). Coordinates are from -1 to 1."""
        (size, speed, start), (other_size, other_speed, other_start) = self._waves
        x, y = x + size * math.sin(speed * y + start), y + other_size * math.sin(other_speed * x + other_start)
        cos, sin = math.cos(self._angle), math.sin(self._angle)
        x, y = x * cos - y * sin, x * sin + y * cos
        return (x + self._slant * y) * self._stretch, y / self._stretch


def draw(letter: str, fonts: list[list[Path]], seed: str) -> np.ndarray:
    """Returns a picture (28, 28) of the letter in a random font and weight.

    Each list of `fonts` has the files of one family.
    """
    choose = random.Random(seed)
    font = opened(choose.choice(choose.choice(fonts)), CANVAS // 2)
    stroke = max(0, round(choose.gauss(0, 0.2) * FINE))  # widens the lines of the letter
    left, top, right, bottom = font.getbbox(letter, stroke_width=stroke)
    large = Image.new("L", (2 * CANVAS, 2 * CANVAS))
    corner = CANVAS - (left + right) / 2, CANVAS - (top + bottom) / 2
    ImageDraw.Draw(large).text(corner, letter, 255, font, stroke_width=stroke)
    bent = large.transform(large.size, Image.Transform.MESH, mesh(Bend(choose), large.width), Image.Resampling.BILINEAR)
    letter_only = bent.crop(bent.getbbox())
    scale = choose.uniform(18, 22) * FINE / max(letter_only.size)
    reduced = letter_only.resize([max(1, round(side * scale)) for side in letter_only.size], Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(reduced, tuple(round((CANVAS - side) / 2 + choose.uniform(-1, 1) * FINE) for side in reduced.size))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


@cache
def opened(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def mesh(bend: Bend, side: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Returns the pieces of a bent picture for Pillow: each target box, and the corners from which it comes."""
    edges = [round(side * place / CELLS) for place in range(CELLS + 1)]

    def source(x: int, y: int) -> Point:
        return tuple((1 + value) * side / 2 for value in bend.source_of(2 * x / side - 1, 2 * y / side - 1))  # type: ignore[return-value]

    return [
        (
            (left, top, right, bottom),
            (*source(left, top), *source(left, bottom), *source(right, bottom), *source(right, top)),
        )
        for left, right in pairwise(edges)
        for top, bottom in pairwise(edges)
    ]


def fonts_in(folder: Path) -> list[list[Path]]:
    """Returns the font files of a folder, in one list for each family. Exits if a font does not have all letters."""
    families = defaultdict(list)
    for path in sorted(path for pattern in (FONT_FILES, "*.ttf", "*.otf") for path in folder.rglob(pattern)):
        families[path.name.split("-latin-")[0]].append(path)
    for path in [path for files in families.values() for path in files]:
        try:
            missing = [letter for letter in LETTERS if not opened(path, CANVAS // 2).getmask(letter).getbbox()]
        except OSError as error:
            sys.exit(f"draw_letters: {path} cannot be read: {error}. Remove it")
        if missing:
            sys.exit(f"draw_letters: {path} has no {missing[0]}. Remove it")
    return list(families.values())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(number)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path, help="folder that is searched for font files, with its subfolders")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--count", type=positive, default=2000, help="training pictures of each letter; default: 2000")
    parser.add_argument("--test-count", type=positive, default=385, help="test pictures of each letter; default: 385")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        parser.error(f"{args.out} must end in .npz, in a folder that exists")
    fonts = fonts_in(args.fonts)
    if not fonts:
        sys.exit(f"draw_letters: {args.fonts} has no fonts. Install them with: npm install --prefix {args.fonts}")
    total = len(LETTERS) * (args.count + args.test_count)
    print(f"drawing {total} pictures, which takes some minutes", flush=True)
    arrays = {"class_names": np.array(list(LETTERS))}
    for split, count in (("train", args.count), ("test", args.test_count)):
        labels = np.repeat(np.arange(len(LETTERS)), count)
        pictures = [draw(LETTERS[label], fonts, f"{args.seed} {split} {n}") for n, label in enumerate(labels)]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = np.stack(pictures), labels
    np.savez_compressed(args.out, **arrays)
    print(f"wrote {args.out}: {args.count} training pictures of each letter, in {len(fonts)} fonts")


if __name__ == "__main__":
    main()
