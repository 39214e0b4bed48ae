"""Draws a data set of digits: `python -m scripts.make_dataset --out synthetic --sampler dpmpp --num-steps 20`.

As MNIST's own IDX files, or as folders 0 to 9 of PNGs. Image i is of digit i mod 10. Started again with
the same arguments it goes on where it stopped; what it leaves is the same either way.
"""

import argparse
import io
import json
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.checkpoint import CheckpointError, write_atomically
from scripts.arguments import Parser, add_drawing_arguments, integer
from scripts.drawing import Drawer, DrawingError, DrawingOptions, open_drawer, options_from
from scripts.evaluation.samples import FACTS, IDX
from scripts.files import write_json
from scripts.mnist import NUM_CLASSES
from scripts.pictures import to_pixels
from scripts.progress import Reporter, fail

PART = 1000  # images that are drawn before they are kept
PARTS = "parts"  # the images so far; gone when all are there


class DatasetError(Exception):
    """The set cannot be made; one sentence."""


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws, and leaves the set in its folder."""
    args = _parse(argv)
    try:
        with Reporter("make_dataset: stopped; start again to go on") as reporter:
            drawer = open_drawer(args)
            if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
                raise DatasetError("this checkpoint does not draw digits of 1x28x28")
            options = options_from(args, drawer.checkpoint)
            if _begin(args.out, _facts(args, drawer, options)):
                _draw_parts(args, drawer, options, reporter)
                write = write_idx if args.format == "idx" else write_pngs
                write(args.out, _read_parts(args.out / PARTS))
                shutil.rmtree(args.out / PARTS)
            reporter.line(f"{args.count} images: {args.out}")
    except (CheckpointError, DatasetError, DrawingError, OSError) as error:
        raise fail(f"make_dataset: {error}".splitlines()[0]) from error


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
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        write_atomically(folder / str(i % NUM_CLASSES) / f"{i // NUM_CLASSES:05d}.png", buffer.getvalue())


def _begin(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether there is something left to do; DatasetError for a folder that holds something else."""
    path = folder / FACTS
    if path.exists():
        if _read_facts(path) != facts:
            raise DatasetError(f"{folder} holds another set; name another --out")
        return (folder / PARTS).exists()
    if any(found != folder / PARTS for found in folder.rglob("*")):
        raise DatasetError(f"{folder} is not empty, and holds no set to go on with")
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return True


def _read_facts(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is damaged: name another --out") from error


def _draw_parts(args: argparse.Namespace, drawer: Drawer, options: DrawingOptions, reporter: Reporter) -> None:
    """Draws what is missing."""
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
    parser.add_argument("--out", type=Path, required=True, help="folder of the set; an unfinished one goes on")
    parser.add_argument("--count", type=integer(1, 1_000_000), default=60_000, help="images; default: 60000")
    parser.add_argument("--format", choices=["idx", "png"], default="idx", help="default: idx, MNIST's own")
    add_drawing_arguments(parser, seed=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
