"""Images that show no digit, to measure how often recognition rejects them. All are 28x28, white on black.

Letters come from the fonts that ship with matplotlib, so that every machine draws the same images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scripts.common.data.data_set import ImageSet
from scripts.common.progress import require

SIZE, BOX = 28, 20  # MNIST scales a digit to a box of 20x20 pixels and centres it by mass in 28x28 pixels
# Letters that have the shape of a digit in many fonts or handwritings are left out: B b D G g I i J j l O o Q q S s Y y
# Z z.
LETTERS = "ACEFHKLMNPRTUVWXacdefhkmnprtuvwx"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")
# Digits that cannot be read as a digit after they are mirrored, turned upside down or halved. A 5 upside down can be
# read as a 5, and half of a 1 is a short 1.
MIRRORED, UPSIDE_DOWN, HALVED = (2, 3, 4, 5, 7), (3, 4, 7), (2, 3, 4, 5, 6, 8, 9)


def non_digits(digits: ImageSet, count: int, seed: int) -> dict[str, Tensor]:
    """Returns `count` images (count, 1, 28, 28) uint8 of each kind. Some kinds are made from the given digits.

    A kind has fewer images if there are fewer digits for it.
    """
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(len(digits.labels)))  # (N,)
    digits = digits.rows(order)

    def some(*labels: int) -> Tensor:
        return digits.images[torch.isin(digits.labels, torch.tensor(labels))][:count]

    threes, zeros = some(3), some(0)
    fewer = min(len(threes), len(zeros))
    return {
        "letters": _drawn(_letter, generator, count),
        "strokes": _drawn(_strokes, generator, count),
        "digits rotated by 90°": some(*MIRRORED).rot90(1, dims=(2, 3)),
        "digits mirrored": some(*MIRRORED).flip(3),
        "digits upside down": some(*UPSIDE_DOWN).rot90(2, dims=(2, 3)),
        "upper half erased": _erased(some(*HALVED), slice(0, SIZE // 2)),
        "lower half erased": _erased(some(*HALVED), slice(SIZE // 2, SIZE)),
        "digits off centre": some(*range(10)).roll((7, -7), dims=(2, 3)),
        "a 3 over a 0": torch.maximum(threes[:fewer], zeros[:fewer]),
        "black on white": 255 - some(*range(10)),
        "checkerboards": _drawn(_checkerboard, generator, count),
        "uniform noise": _drawn(lambda random: random.integers(0, 256, (SIZE, SIZE)), generator, count),
        "Gaussian noise": _drawn(lambda random: random.normal(0, 80, (SIZE, SIZE)), generator, count),
        "blank": _drawn(lambda random: np.full((SIZE, SIZE), random.integers(0, 256)), generator, count),
    }


def _drawn(draw: Callable[[np.random.Generator], np.ndarray], generator: np.random.Generator, count: int) -> Tensor:
    pictures = np.stack([draw(generator) for _ in range(count)]).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pictures)[:, None]


def _letter(random: np.random.Generator) -> np.ndarray:
    """Draws a letter and scales it as MNIST scales digits."""
    folder = Path(require("matplotlib").get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{random.choice(FONTS)}.ttf", 96)
    large = Image.new("L", (192, 192))
    ImageDraw.Draw(large).text((40, 30), str(random.choice(list(LETTERS))), 255, font)
    drawn = large.crop(large.getbbox())
    scale = BOX / max(drawn.size)
    width, height = (max(round(length * scale), 1) for length in drawn.size)
    pixels = np.asarray(drawn.resize((width, height), Image.Resampling.BOX), dtype=float)
    rows, columns = np.indices(pixels.shape)
    top, left = (round(SIZE / 2 - 0.5 - (pixels * place).sum() / pixels.sum()) for place in (rows, columns))
    top, left = min(max(top, 0), SIZE - height), min(max(left, 0), SIZE - width)
    picture = np.zeros((SIZE, SIZE))
    picture[top : top + height, left : left + width] = pixels
    return picture


def _strokes(random: np.random.Generator) -> np.ndarray:
    """Draws two to four straight lines between random points, as wide as the strokes of a digit."""
    large = Image.new("L", (4 * SIZE, 4 * SIZE))
    pen = ImageDraw.Draw(large)
    for _ in range(random.integers(2, 5)):
        pen.line([tuple(point) for point in random.integers(20, 92, (2, 2)).tolist()], 255, 9)
    return np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=float)


def _checkerboard(random: np.random.Generator) -> np.ndarray:
    """Draws squares of 1 to 7 pixels, at a random position."""
    side, right, down = random.integers(1, 8), *random.integers(0, 14, 2)
    rows, columns = np.indices((SIZE, SIZE))
    return 255.0 * (((rows + down) // side + (columns + right) // side) % 2)


def _erased(images: Tensor, rows: slice) -> Tensor:
    images = images.clone()  # (N, 1, H, W)
    images[:, :, rows] = 0
    return images
