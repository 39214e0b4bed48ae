"""Fixed pictures of handwritten digits and letters that are not from MNIST: `python -m scripts.evaluation.handwriting`.

The pictures imitate uploads of users. They are 40 to 600 pixels wide. The character is off centre and tilted. Ink and
paper have different colours. The four archives in handwriting_sets are fixed. The parts `digits-test` and
`letters-test` measure recognition, and no setting is chosen with them. `digits-validation` and `letters-validation`
have other fonts and are for choosing settings. The command makes new archives from a folder of font files.
"""

import io
import json
import random
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from model.files import write_atomically
from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.evaluation.mouse import STYLES, draw_digit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Literal["test", "validation"]
Colour = tuple[int, int, int]
Label = TypeVar("Label", int, str)

FOLDER = Path(__file__).with_name("handwriting_sets")
PARTS: tuple[Part, ...] = ("test", "validation")
PARAMETERS = "parameters.json"
DIGITS = "0123456789"
LETTERS = "AEHKMNRVW"  # README.md says why the others are left out
# Fonts of the validation parts are not in the test parts.
FONTS: dict[Part, tuple[str, ...]] = {
    "test": (
        "breip",
        "caveat",
        "dkg",
        "gochi-hand",
        "homemade-apple",
        "indie-flower",
        "kalam",
        "kristi",
        "nanum-pen-script",
        "over-the-rainbow",
        "permanent-marker",
        "reenie-beanie",
    ),
    "validation": ("gloria-hallelujah", "nothing-you-could-do"),
}
SUFFIXES = (".woff", ".ttf", ".otf")
SEED = "unfog handwriting 1"
FONT_SIZE = 1200  # pixels; nearly all characters are then made smaller, which keeps their edges smooth
PNG_COLOURS = 4  # paper, ink and two colours between them; more colours make the files larger
MIN_CHARACTER = 16  # pixels of the longest side
TILE = 56  # pixels of a picture in the contact sheet


class Picture(NamedTuple, Generic[Label]):
    """An encoded picture (PNG or JPEG) of one character."""

    data: bytes
    label: Label
    font: str
    variant: str


@dataclass(frozen=True, slots=True)
class Variant:
    """Ranges from which the look of a picture is chosen. Each range is (lowest, highest)."""

    side: tuple[int, int]  # pixels
    tilt: float  # largest angle in degrees, in both directions
    inks: tuple[Colour, ...]
    papers: tuple[Colour, ...]
    noise: tuple[float, float]  # standard deviation in grey levels
    shade: float = 0  # largest change of the brightness from one side to the other, as a share
    blur: tuple[float, float] = (0, 0)  # standard deviation in pixels
    quality: int = 0  # of JPEG; 0 is PNG
    grey: bool = False


BLACK, BLUE, RED, GREEN, VIOLET = (25, 25, 30), (30, 50, 150), (185, 35, 40), (20, 105, 60), (95, 40, 130)
WHITE, CREAM, YELLOW, SKY, ROSE = (253, 253, 252), (246, 238, 218), (250, 240, 165), (222, 234, 246), (248, 226, 226)
VARIANTS = {
    "scan": Variant((40, 100), 8, (BLACK, (60, 60, 70)), (WHITE, (240, 240, 238)), (1, 3), quality=75, grey=True),
    "photo": Variant(
        (64, 180),
        15,
        (BLACK, BLUE, RED, GREEN, VIOLET),
        (CREAM, YELLOW, SKY, ROSE, (226, 226, 222)),
        (2, 6),
        shade=0.2,
        blur=(0.3, 1),
        quality=45,
    ),
    "inverted": Variant(
        (44, 220), 12, ((255, 255, 255), (225, 225, 225)), ((0, 0, 0), (35, 35, 35)), (0, 2), quality=45, grey=True
    ),
    "canvas": Variant((130, 600), 15, (BLACK, BLUE, RED, GREEN, VIOLET), ((255, 255, 255), CREAM, SKY), (0, 0)),
}


@dataclass(frozen=True, slots=True)
class Look:
    """The parameters with which one picture is made from the mask of a character."""

    width: int  # pixels, as all sizes and places
    height: int
    character: int  # longest side
    x: int  # of the character's left edge
    y: int  # of its upper edge
    tilt: float  # degrees, anticlockwise
    stretch: float  # factor of the character's width
    ink: Colour
    paper: Colour
    opacity: float
    noise: float
    shade: float
    blur: float
    quality: int
    grey: bool
    noise_seed: int


def load_handwriting(part: Part = "test") -> list[Picture[int]]:
    """Returns the fixed pictures of digits, in the order font, digit, variant.

    Raises OSError if the archive is missing.
    """
    return [Picture(data, int(label), font, variant) for data, label, font, variant in _read(f"digits-{part}")]


def load_letters(part: Part = "test") -> list[Picture[str]]:
    """Returns the fixed pictures of capital letters that do not look like a digit, as load_handwriting does."""
    return [Picture(*row) for row in _read(f"letters-{part}")]


def load_parameters(name: str) -> dict[str, dict[str, object]]:
    """Returns the fields of the Look of each picture, by file name. `name` is an archive, for example `digits-test`."""
    looks: dict[str, dict[str, object]] = json.loads(_unpack(name)[PARAMETERS])
    return looks


def _read(name: str) -> list[tuple[bytes, str, str, str]]:
    rows = []
    for file, data in _unpack(name).items():
        if file != PARAMETERS:  # other names have the form caveat/7-photo.jpg
            label, variant = PurePath(file).stem.split("-")
            rows.append((data, label, PurePath(file).parent.name, variant))
    return rows


def _unpack(name: str) -> dict[str, bytes]:
    """Returns the contents of the files in an archive, in their order."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        # extractfile returns None only for folders. The archives have no folders.
        return {member.name: cast(IO[bytes], archive.extractfile(member)).read() for member in archive}


def find_fonts(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Returns the font file of each name. Raises ScriptError if one is missing."""
    found = {}
    for name in names:
        paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
        if not paths:
            raise ScriptError(
                f"{folder} has no {name}.woff, .ttf or .otf. {FOLDER.name}/README.md says where to get it"
            )
        found[name] = paths[0]
    return found


def build_set(characters: str, fonts: Mapping[str, Path], styles: tuple[str, ...] = ()) -> bytes:
    """Returns an archive with every character of every font in all variants, and their parameters.

    `styles` are styles of scripts.evaluation.mouse, added after the fonts. They have digits only.
    """
    files, looks = {}, {}
    for font in (*fonts, *styles):
        for character in characters:
            for variant in VARIANTS:
                file, data, look = render(character, font, variant, fonts.get(font))
                files[file], looks[file] = data, asdict(look)
    files[PARAMETERS] = json.dumps(looks, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    # xz stores the equal headers of the pictures once. A zip is larger by a third.
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(file)  # with a fixed date, so that equal pictures give equal archives
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def render(character: str, font: str, variant: str, path: Path | None) -> tuple[str, bytes, Look]:
    """Returns the file name in the archive, the encoded picture and its parameters.

    They depend only on the arguments. `path` is the font file, or None for a style of scripts.evaluation.mouse.
    """
    generator = random.Random(f"{SEED}/{font}/{character}/{variant}")
    mask = draw_character(character, path) if path else draw_digit(int(character), font, generator)
    look, placed = _choose_look(mask, VARIANTS[variant], generator)
    pixels = _paint(placed, look)
    buffer = io.BytesIO()
    if look.quality:
        pixels.save(buffer, "JPEG", quality=look.quality, optimize=True)
    else:
        pixels.quantize(PNG_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True, bits=2)
    return f"{font}/{character}-{variant}.{'jpg' if look.quality else 'png'}", buffer.getvalue(), look


def draw_character(character: str, path: Path) -> Image.Image:
    """Returns the mask of a character (255 is ink), cropped to it. Raises OSError if the font cannot be read."""
    font = ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    mask = Image.new("L", (right - left + 20, bottom - top + 20))
    ImageDraw.Draw(mask).text((10 - left, 10 - top), character, fill=255, font=font)
    return mask.crop(mask.getbbox())


def _choose_look(mask: Image.Image, variant: Variant, generator: random.Random) -> tuple[Look, Image.Image]:
    """Returns the parameters, and the mask in the size of the picture."""
    uniform = generator.uniform
    low, high = variant.side
    side = low * (high / low) ** generator.random()  # log-uniform: small and large pictures are equally frequent
    width, height = (min(max(round(side * uniform(0.85, 1.2)), low), high) for _ in range(2))
    tilt, stretch = round(uniform(-variant.tilt, variant.tilt), 1), round(uniform(0.9, 1.1), 3)
    longest = max(MIN_CHARACTER, round(min(width, height) * uniform(0.35, 0.8)))
    character = _transform(mask, tilt, stretch, longest)
    margin = 2  # pixels; MIN_CHARACTER leaves more room than this in the smallest picture
    x, y = (
        margin + round(generator.random() * (whole - part - 2 * margin))
        for whole, part in zip((width, height), character.size, strict=True)
    )
    placed = Image.new("L", (width, height))
    placed.paste(character, (x, y))
    look = Look(
        width=width,
        height=height,
        character=longest,
        x=x,
        y=y,
        tilt=tilt,
        stretch=stretch,
        ink=generator.choice(variant.inks),
        paper=generator.choice(variant.papers),
        opacity=round(uniform(0.85, 1), 3),
        noise=round(uniform(*variant.noise), 2),
        shade=round(uniform(-variant.shade, variant.shade), 3),
        blur=round(uniform(*variant.blur), 2),
        quality=variant.quality,
        grey=variant.grey,
        noise_seed=generator.randrange(2**32),
    )
    return look, placed


def _transform(mask: Image.Image, tilt: float, stretch: float, longest: int) -> Image.Image:
    """Stretches and tilts a mask, crops it to the ink, and scales its longest side to the given length."""
    wide = mask.resize((max(round(mask.width * stretch), 1), mask.height), Image.Resampling.BICUBIC)
    tilted = wide.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    tilted = tilted.crop(tilted.getbbox())
    factor = longest / max(tilted.size)
    size = tuple(max(round(length * factor), 1) for length in tilted.size)
    return tilted.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _paint(mask: Image.Image, look: Look) -> Image.Image:
    """Blends ink into the paper with the mask as opacity. Then adds a brightness gradient and noise."""
    mask = mask.filter(ImageFilter.GaussianBlur(look.blur))
    ink = np.asarray(mask, np.float64)[..., None] / 255  # (H, W, 1)
    if not look.quality:
        ink = (ink * (PNG_COLOURS - 1)).round() / (PNG_COLOURS - 1)
    ink = ink * look.opacity
    pixels = np.array(look.paper) * (1 - ink) + np.array(look.ink) * ink  # (H, W, 3)
    pixels *= 1 + look.shade * np.linspace(-0.5, 0.5, look.width)[:, None]
    noise = np.random.default_rng(look.noise_seed).normal(0, look.noise, (look.height, look.width, 1))
    image = Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))
    return image.convert("L") if look.grey else image


def show_handwriting(part: Part = "test") -> "Figure":
    """Draws a contact sheet of the digits: one row per font, one column per digit. The variants alternate."""
    pictures = load_handwriting(part)
    groups = [pictures[i : i + len(VARIANTS)] for i in range(0, len(pictures), len(VARIANTS))]
    chosen = [group[(i + i // len(DIGITS)) % len(VARIANTS)] for i, group in enumerate(groups)]
    fonts = list(dict.fromkeys(picture.font for picture in chosen))
    tiles = np.stack([tile(picture.data) for picture in chosen])  # (F * 10, T, T, 3)
    rows = tiles.reshape(len(fonts), len(DIGITS), TILE, TILE, 3).transpose(0, 2, 1, 3, 4)
    pixels = torch.from_numpy(rows.reshape(len(fonts) * TILE, len(DIGITS) * TILE, 3).copy())
    return draw_panels([Panel(pixels, list(DIGITS), fonts)], scale=1)


def tile(data: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Returns a picture on a grey square, (TILE, TILE, 3). Small pictures are enlarged."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = (TILE - 2) / max(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), (150, 150, 150))
    square.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return np.asarray(square)


@reports_errors("handwriting")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the archives or the contact sheet."""
    args = build_parser().parse_args(argv)
    for part in PARTS if args.fonts else ():
        fonts = find_fonts(args.fonts, FONTS[part])
        styles = tuple(STYLES) if part == "test" else ()
        write_atomically(args.out / f"digits-{part}.tar.xz", build_set(DIGITS, fonts, styles))
        write_atomically(args.out / f"letters-{part}.tar.xz", build_set(LETTERS, fonts))
    if args.sheet:
        save_figure(show_handwriting(), args.sheet, grey=False, colours=256)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.evaluation.handwriting", description=__doc__)
    parser.add_argument("--fonts", type=Path, help="folder of font files; the archives are made again from them")
    parser.add_argument("--out", type=Path, default=Path("runs/handwriting"), help="default: runs/handwriting")
    parser.add_argument("--sheet", type=Path, help="PNG file for a contact sheet of the fixed digits")
    return parser


if __name__ == "__main__":
    main()
