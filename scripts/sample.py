"""Draws digits to PNG files without the service: `python -m scripts.sample --digit 7 --count 16 --out sevens.png`."""

import argparse
import importlib.metadata
import io
import math
import secrets
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from model.checkpoint import CheckpointError, write_atomically
from scripts.common.arguments import Parser, add_drawing_arguments, integer
from scripts.common.drawing import Drawer, DrawingError, DrawingOptions, open_drawer, options_from
from scripts.common.pictures import grid
from scripts.common.progress import Reporter, fail


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws, and writes a sheet or a folder."""
    args = _parse(argv)
    if args.out.suffix.lower() not in ("", ".png"):
        raise fail(f"sample: --out {args.out} must be a .png file or a folder")
    seed = secrets.randbelow(2**53) if args.seed is None else args.seed
    try:
        with Reporter() as reporter:
            drawer = open_drawer(args)
            options = options_from(args, drawer.checkpoint)
            digits = choose_digits(args.digit, len(drawer.class_names))
            drawer.compile(args.compile, reporter)
            y = torch.tensor(digits).repeat_interleave(args.count)  # (N,)
            index = torch.arange(args.count).repeat(len(digits))  # (N,) each digit counts from 0, as a request does
            x_0 = drawer.draw(y, index, options, reporter, seed=seed, batch_size=args.batch_size)
            facts = provenance(drawer, options, seed)
            if args.out.suffix.lower() == ".png":
                write_sheet(args.out, x_0, digits, facts, scale=args.scale)
            else:
                write_folder(args.out, x_0, y, index, facts, scale=args.scale)
            reporter.line(f"{len(y)} images with seed {seed}: {args.out}")
    except (CheckpointError, DrawingError, OSError) as error:
        raise fail(f"sample: {error}".splitlines()[0]) from error


def choose_digits(asked: list[str], num_classes: int) -> list[int]:
    """Returns the digits of --digit in order, each once; `all` means every class. Raises DrawingError for others."""
    digits: list[int] = []
    for text in asked:
        known = [str(digit) for digit in range(num_classes)]
        if text != "all" and text not in known:
            raise DrawingError(f"--digit {text}: must be 0 to {num_classes - 1} or all")
        digits += range(num_classes) if text == "all" else [int(text)]
    return list(dict.fromkeys(digits))


def provenance(drawer: Drawer, options: DrawingOptions, seed: int) -> dict[str, str]:
    """Returns the text chunks of every PNG except digit and index."""
    return {
        "Software": f"unfog {importlib.metadata.version('unfog')}",
        "Seed": str(seed),
        "Sampler": options.sampler,
        "Steps": str(options.num_steps),
        "Guidance-Scale": str(options.guidance.scale),
        "Model-SHA256": drawer.checkpoint.sha256,
    }


def write_sheet(path: Path, x_0: Tensor, digits: list[int], facts: dict[str, str], *, scale: int) -> None:
    """Writes images (N, C, H, W), equally many of each digit, as one PNG.

    Each digit gets a row; the images of a single digit fill a square.
    """
    count = len(x_0) // len(digits)
    columns = count if len(digits) > 1 else math.ceil(math.sqrt(count))
    missing = -len(x_0) % columns
    x_0 = torch.cat([x_0, torch.full((missing, *x_0.shape[1:]), -1.0)])
    text = {**facts, "Digit": ",".join(map(str, digits)), "Index": f"0-{count - 1}" if count > 1 else "0"}
    write_atomically(path, _encode(grid(x_0, columns), text, scale))


def write_folder(folder: Path, x_0: Tensor, y: Tensor, index: Tensor, facts: dict[str, str], *, scale: int) -> None:
    """Writes one PNG per image, named as in the service's ZIP."""
    for image, digit, i in zip(x_0, y.tolist(), index.tolist(), strict=True):
        text = {**facts, "Digit": str(digit), "Index": str(i)}
        name = f"digit-{digit}-seed-{facts['Seed']}-{i}.png"
        write_atomically(folder / name, _encode(grid(image[None], 1), text, scale))


def _encode(pixels: Tensor, text: dict[str, str], scale: int) -> bytes:
    """Returns pixels, uint8 (H, W, C), as a PNG enlarged by whole pixels."""
    array = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in text.items():
        chunks.add_text(name, value)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.sample", description=__doc__)
    parser.add_argument("--digit", action="append", required=True, help="0 to 9 or all; can be repeated")
    parser.add_argument("--count", type=integer(1, 10_000), default=1, help="images per digit; default: 1")
    parser.add_argument(
        "--out", type=Path, required=True, help="a .png file for one sheet, or a folder for one PNG per image"
    )
    parser.add_argument("--scale", type=integer(1, 16), default=1, help="enlarge by this factor; default: 1")
    add_drawing_arguments(parser, seed=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
