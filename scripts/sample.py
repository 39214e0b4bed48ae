"""Generates digits without the service: `python -m scripts.sample --digit 7 --count 16 --out sevens.png`.

With --like, generates a picture again from its text chunks, and says whether it is identical.
"""

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.files import write_atomically
from model.png import MAX_SCALE, ClipProvenance, Provenance, encode_pixels
from scripts.common.arguments import Parser, add_drawing_arguments, from_arguments, given_options, integer
from scripts.common.drawing import ClipOptions, Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.pictures import arrange, grid
from scripts.common.progress import Reporter
from scripts.common.reproduction import checkpoint_of, describe, draw_again, read_original

PERMITTED_WITH_LIKE = ("checkpoint", "clip_model", "batch_size", "compile", "num_threads")


@reports_errors("sample")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.like:
        reproduce(args)
        return
    if missing := [f"--{name}" for name in ("digit", "out") if getattr(args, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    generate(args)


def reproduce(args: argparse.Namespace) -> None:
    """Generates the picture --like again and reports the difference. Exits with status 1 if it is not identical."""
    given = [f"--{name}" for name in ("digit", "count", "scale") if getattr(args, name) is not None]
    if given := given + given_options(args, kept=PERMITTED_WITH_LIKE):
        raise ScriptError(
            f"{given[0]} cannot be combined with --like: the text chunks of the picture determine it. Remove it"
        )
    if args.out and args.out.suffix.lower() != ".png":
        raise ScriptError(f"--out {args.out} must be a .png file")
    original = read_original(args.like)
    given_checkpoint = args.checkpoint if "checkpoint" in args.given else None
    request = replace(from_arguments(DrawingRequest, args), checkpoint=checkpoint_of(original, given_checkpoint))
    with Reporter() as reporter:
        difference = draw_again(original, request, reporter, args.out)
        reporter.line(describe(original, difference))
    if difference.different:
        sys.exit(1)


def generate(args: argparse.Namespace) -> None:
    """Generates the images that the arguments ask for, and writes them to --out."""
    count, scale = args.count or 1, args.scale or 1
    if args.out.suffix.lower() not in ("", ".png"):
        raise ScriptError(f"--out {args.out} must be a .png file or a folder")
    seed = secrets.randbelow(2**53) if args.seed is None else args.seed
    request = from_arguments(DrawingRequest, args)
    with Reporter() as reporter:
        drawer = open_drawer(request)
        digits = choose_digits(args.digit, len(drawer.class_names))
        options = options_from(request, drawer.checkpoint)
        drawer.compile(request.compile, reporter)
        y = torch.tensor(digits).repeat_interleave(count)  # (N,)
        index = torch.arange(count).repeat(len(digits))  # (N,) from 0 for each digit, as in a request
        x_0 = drawer.draw(y, index, options, reporter, seed=seed, batch_size=request.batch_size)
        if args.out.suffix.lower() == ".png":
            provenance = _provenance(drawer, options, seed, ",".join(map(str, digits)))
            write_sheet(args.out, x_0, len(digits), provenance, scale=scale)
        else:
            for digit in digits:
                provenance = _provenance(drawer, options, seed, digit)
                write_folder(args.out, x_0[y == digit], provenance, scale=scale)
        images = "1 image" if len(y) == 1 else f"{len(y)} images"
        reporter.line(f"wrote {images} with seed {seed}: {args.out}")


def choose_digits(asked: list[str], num_classes: int) -> list[int]:
    """Returns the digits of --digit in order, without duplicates. `all` means every class.

    Raises ScriptError for a value that is not a digit.
    """
    digits: list[int] = []
    for text in asked:
        known = [str(digit) for digit in range(num_classes)]
        if text != "all" and text not in known:
            raise ScriptError(f"--digit {text}: must be 0 to {num_classes - 1} or all")
        digits += range(num_classes) if text == "all" else [int(text)]
    return list(dict.fromkeys(digits))


def write_sheet(path: Path, x_0: Tensor, num_digits: int, provenance: Provenance, *, scale: int) -> None:
    """Writes images (N, C, H, W) as one PNG. They are sorted by digit, and each digit has the same number of images.

    Each digit gets one row. The images of a single digit are arranged in a square.
    """
    count = len(x_0) // num_digits
    text = provenance.text(f"0-{count - 1}" if count > 1 else 0)
    write_atomically(path, encode_pixels(arrange(x_0, num_digits).numpy(), scale=scale, text=text))


def write_folder(folder: Path, x_0: Tensor, provenance: Provenance, *, scale: int) -> None:
    """Writes images (N, C, H, W) of one digit as one PNG each, with the file names of the service's ZIP answer."""
    for index, image in enumerate(x_0):
        png = encode_pixels(grid(image[None], 1).numpy(), scale=scale, text=provenance.text(index))
        write_atomically(folder / f"digit-{provenance.digit}-seed-{provenance.seed}-{index}.png", png)


def _provenance(drawer: Drawer, options: DrawingOptions, seed: int, digit: int | str) -> Provenance:
    return Provenance(
        digit=digit,
        seed=seed,
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance_scale=options.guidance.scale,
        model_sha256=drawer.checkpoint.sha256,
        clip=_clip_provenance(options.clip, str(digit), drawer.class_names) if options.clip else None,
    )


def _clip_provenance(clip: ClipOptions, digits: str, class_names: Sequence[str]) -> ClipProvenance:
    """Returns the CLIP guidance of images of one digit, or of a sheet of digits that are separated by commas."""
    prompt = clip.prompt_of(class_names[int(digits)]) if digits.isdecimal() else clip.prompt
    return ClipProvenance(clip.guidance.scale, prompt, clip.sha256)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.sample", description=__doc__)
    parser.add_argument("--digit", action="append", help="0 to 9 or all; may be repeated; required without --like")
    parser.add_argument("--count", type=integer(1, 10_000), help="images per digit, 1 to 10000; default: 1")
    parser.add_argument(
        "--out",
        type=Path,
        help="a .png file for one sheet of all images, or a folder for one PNG per image; required without --like",
    )
    parser.add_argument(
        "--scale", type=integer(1, MAX_SCALE), help="integer factor that enlarges the images, 1 to 16; default: 1"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="PICTURE.png",
        help="generate a picture of the service or of this script again, and compare the pixels. The exit status is 0 "
        "if they are identical, otherwise 1. The checkpoint is the shipped one that generated the picture, unless "
        "--checkpoint is given. The CLIP model is the one that ships with unfog, unless --clip-model is given. The "
        "precision is that of UNFOG_DTYPE=auto. Give --compile the value that UNFOG_COMPILE had",
    )
    add_drawing_arguments(parser, seed=None)
    return parser


if __name__ == "__main__":
    main()
