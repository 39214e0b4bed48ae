"""Draws a data set of digits: `python -m scripts.make_dataset --out synthetic --sampler dpmpp --num-steps 20`.

Writes MNIST's IDX files, or PNGs in folders 0 to 9. Image i is of digit i mod 10. A run that was stopped continues
when it is started again with the same arguments, and the result is the same as without the stop.
"""

import argparse
import json
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.checkpoint import write_atomically
from model.pixels import to_pixels
from model.png import encode_png
from scripts.common.arguments import Parser, add_drawing_arguments, integer
from scripts.common.drawing import Drawer, DrawingOptions, open_drawer, options_from
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.files import write_json
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.samples import FACTS, IDX

PART = 1000  # images that are drawn before they are kept
PARTS = "parts"  # the images so far; gone when all are there


@reports_errors("make_dataset")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws the images and writes the data set."""
    args = _parse(argv)
    with Reporter("make_dataset: stopped; start again to go on") as reporter:
        drawer = open_drawer(args)
        if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
            raise ScriptError("this checkpoint does not draw digits of 1x28x28")
        options = options_from(args, drawer.checkpoint)
        begun = _find(args.out)
        drawer.compile(_compile_mode(args.compile, begun), reporter)
        if _begin(args.out, begun, _facts(args, drawer, options)):
            _draw_parts(args, drawer, options, reporter)
            write = write_idx if args.format == "idx" else write_pngs
            write(args.out, _read_parts(args.out / PARTS))
            shutil.rmtree(args.out / PARTS)
        reporter.line(f"{args.count} images: {args.out}")


def write_idx(folder: Path, images: np.ndarray) -> None:
    """uint8 (N, 28, 28) as two files, as LeCun's page has it: magic number, sizes, bytes."""
    count = len(images)
    labels = (np.arange(count) % NUM_CLASSES).astype(np.uint8)
    header = struct.pack(">4i", 2051, *images.shape)
    write_atomically(folder / IDX[0], header + images.tobytes())
    write_atomically(folder / IDX[1], struct.pack(">2i", 2049, count) + labels.tobytes())


def write_pngs(folder: Path, images: np.ndarray) -> None:
    """uint8 (N, 28, 28) as a folder a digit."""
    for i, image in enumerate(images):
        png = encode_png(Image.fromarray(image))
        write_atomically(folder / str(i % NUM_CLASSES) / f"{i // NUM_CLASSES:05d}.png", png)


def _find(folder: Path) -> dict[str, Any] | None:
    """Returns the facts of the data set in the folder, None if it is empty; raises ScriptError for other content."""
    path = folder / FACTS
    if not path.exists():
        if any(found != folder / PARTS for found in folder.rglob("*")):
            raise ScriptError(f"{folder} is not empty and holds no data set; choose another --out")
        return None
    try:
        begun = json.loads(path.read_text("utf-8"))
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise ScriptError(f"{path} is damaged; choose another --out")
    return begun


def _compile_mode(mode: str, begun: dict[str, Any] | None) -> str:
    """Makes `auto` continue a data set the way it was begun: one set must not mix two ways of rounding."""
    if mode == "auto" and begun and "compiled" in begun:
        return "on" if begun["compiled"] else "off"
    return mode


def _begin(folder: Path, begun: dict[str, Any] | None, facts: dict[str, Any]) -> bool:
    """Returns whether images are missing; raises ScriptError for a data set made with other arguments."""
    if begun is not None:
        if differing := sorted(name for name in {*begun, *facts} if begun.get(name) != facts.get(name)):
            raise ScriptError(f"{folder} holds a data set with another {differing[0]}; choose another --out")
        return (folder / PARTS).exists()
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)
    return True


def _draw_parts(args: argparse.Namespace, drawer: Drawer, options: DrawingOptions, reporter: Reporter) -> None:
    """Draws the missing parts."""
    for start in range(0, args.count, PART):
        path = args.out / PARTS / f"{start:07d}"
        if path.exists():
            continue
        index = torch.arange(start, min(start + PART, args.count))
        reporter.line(f"images {start} to {start + len(index) - 1} of {args.count}")
        x_0 = drawer.draw(index % NUM_CLASSES, index, options, reporter, seed=args.seed, batch_size=args.batch_size)
        write_atomically(path, to_pixels(x_0).numpy().tobytes())


def _read_parts(folder: Path) -> np.ndarray:
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("[0-9]*")))
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, 28, 28)


def _facts(args: argparse.Namespace, drawer: Drawer, options: DrawingOptions) -> dict[str, Any]:
    return {
        **drawer.facts,
        "options": asdict(options),
        "seed": args.seed,
        "count": args.count,
        "format": args.format,
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.make_dataset", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; an unfinished set continues")
    parser.add_argument("--count", type=integer(1, 1_000_000), default=60_000, help="images; default: 60000")
    parser.add_argument("--format", choices=["idx", "png"], default="idx", help="default: idx, MNIST's file format")
    add_drawing_arguments(parser, seed=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
