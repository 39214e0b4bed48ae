"""Generates digits without the service: `python -m scripts.sample --digit 7 --count 16 --out sevens.png`.

With --like, generates a picture again from its text chunks, and says whether it is identical.
"""

import argparse
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from app.tasks.images import file_name_of
from app.tasks.labels import folded_name
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
    if missing := [f"--{name}" for name in ("label", "out") if getattr(args, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    generate(args)


def reproduce(args: argparse.Namespace) -> None:
    """Generates the picture --like again and reports the difference. Exits with status 1 if it is not identical."""
    given = [f"--{name}" for name in ("label", "count", "scale") if getattr(args, name) is not None]
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
        labels = choose_labels(args.label, drawer.class_names)
        options = options_from(request, drawer.checkpoint)
        drawer.compile(request.compile, reporter)
        y = torch.tensor(labels).repeat_interleave(count)  # (N,)
        index = torch.arange(count).repeat(len(labels))  # (N,) from 0 for each class, as in a request
        x_0 = drawer.draw(y, index, options, reporter, seed=seed, batch_size=request.batch_size)
        if args.out.suffix.lower() == ".png":
            write_sheet(args.out, x_0, len(labels), _provenance(drawer, options, seed, labels), scale=scale)
        else:
            of_labels = {label: _provenance(drawer, options, seed, [label]) for label in labels}
            names = Counter(map(file_name_of, of_labels.values()))
            for label, provenance in of_labels.items():
                name = file_name_of(provenance)
                name += f"-{label}" if names[name] > 1 else ""  # Two classes can have the same name of files.
                write_folder(args.out, name, x_0[y == label], provenance, scale=scale)
        images = "1 image" if len(y) == 1 else f"{len(y)} images"
        reporter.line(f"wrote {images} with seed {seed}: {args.out}")


def choose_labels(asked: list[str], class_names: Sequence[str]) -> list[int]:
    """Returns the labels of --label in order, without duplicates. `all` means every class if no class has this name.

    Raises ScriptError for a value that is not the name or the number of a class.
    """
    known = {str(label): label for label in range(len(class_names))}
    known |= {name: label for label, name in enumerate(class_names)}  # A name has priority over a number.
    folded = {folded_name(name): name for name in reversed(class_names)}
    labels: list[int] = []
    for given in asked:
        text = given if given in known else folded.get(folded_name(given), given)
        if text not in known and text != "all":
            raise ScriptError(f"--label {text}: must be 0 to {len(class_names) - 1}, the name of a class, or all")
        labels += [known[text]] if text in known else range(len(class_names))
    return list(dict.fromkeys(labels))


def write_sheet(path: Path, x_0: Tensor, num_classes: int, provenance: Provenance, *, scale: int) -> None:
    """Writes images (N, C, H, W) as one PNG. They are sorted by class, and each class has the same number of images.

    Each class gets one row. The images of a single class are arranged in a square.
    """
    count = len(x_0) // num_classes
    text = provenance.text(f"0-{count - 1}" if count > 1 else 0)
    write_atomically(path, encode_pixels(arrange(x_0, provenance.shape(count)).numpy(), scale=scale, text=text))


def write_folder(folder: Path, name: str, x_0: Tensor, provenance: Provenance, *, scale: int) -> None:
    """Writes images (N, C, H, W) of one class as one PNG each. `name` is the start of the names of the files."""
    for index, image in enumerate(x_0):
        png = encode_pixels(grid(image[None], 1).numpy(), scale=scale, text=provenance.text(index))
        write_atomically(folder / f"{name}-seed-{provenance.seed}-{index}.png", png)


def _provenance(drawer: Drawer, options: DrawingOptions, seed: int, labels: list[int]) -> Provenance:
    spec = drawer.checkpoint.config.spec
    return Provenance(
        labels=tuple(spec.class_names[label] for label in labels),
        seed=seed,
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance_scale=options.guidance.scale,
        model_sha256=drawer.checkpoint.sha256,
        clip=_clip_provenance(options.clip, labels, spec.class_names) if options.clip else None,
        has_digits=spec.has_digits,
    )


def _clip_provenance(clip: ClipOptions, labels: list[int], class_names: Sequence[str]) -> ClipProvenance:
    """Returns the CLIP guidance of images of these classes."""
    prompt = clip.prompt_of(class_names[labels[0]]) if len(labels) == 1 else clip.prompt
    return ClipProvenance(clip.guidance.scale, prompt, clip.sha256)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.sample", description=__doc__)
    parser.add_argument(
        "--label",
        "--digit",
        dest="label",
        action="append",
        help="a class: its name or number, such as 7, or all; may be repeated; required without --like",
    )
    parser.add_argument("--count", type=integer(1, 10_000), help="images per class, 1 to 10000; default: 1")
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
