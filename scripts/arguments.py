"""Command lines: arguments that several scripts share, each checked, a wrong one answered in one sentence."""

import argparse
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from model.checkpoint import SHIPPED
from model.sampler import MAX_GUIDANCE_SCALE, SAMPLERS
from scripts.mnist import NUM_CLASSES


class Parser(argparse.ArgumentParser):
    """A parser whose error is one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong; exit status 2."""
        print(f"{self.prog}: {message} (--help shows all arguments)", file=sys.stderr)
        sys.exit(2)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is an integer from low to high."""
    wanted = f"an integer from {low} to {high}" if high is not None else f"an integer of {low} or more"

    def parse(text: str) -> int:
        # int() would take 1_000 and Arabic-Indic figures too; 20 figures are more than any argument has
        if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= (high or int(text))):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return int(text)

    return parse


def num_images(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a number of images, as many of each digit."""
    parse = integer(low, high)

    def parse_multiple(text: str) -> int:
        if parse(text) % NUM_CLASSES:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {NUM_CLASSES}: each digit counts alike")
        return parse(text)

    return parse_multiple


def file_to_write(suffix: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write, whose name ends in .png or the like."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text} does not end in {suffix}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder")
        return path

    return parse


def positive(text: str) -> float:
    """The type of an argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def guidance_scale(text: str) -> float:
    """The type of --guidance-scale."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= MAX_GUIDANCE_SCALE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_GUIDANCE_SCALE}")
    return value


class _Given(argparse.Action):
    """Stores the value, and that the option was given: also where the value is the default, it was meant to count."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.given = (*namespace.given, self.dest)


def given_options(args: argparse.Namespace, *, kept: Collection[str] = ()) -> list[str]:
    """Which of the options of `add_drawing_arguments` were given, but for those kept, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in args.given if name not in kept]


def add_drawing_arguments(parser: argparse.ArgumentParser, *, seed: int | None, without: Collection[str] = ()) -> None:
    """Which checkpoint draws, and how: what `drawing.open_drawer` and `drawing.options_from` read.

    `without` names the options that the command decides itself: they are refused.
    """
    default = "drawn at random" if seed is None else str(seed)
    options: dict[str, dict[str, Any]] = {
        "checkpoint": {"type": Path, "default": SHIPPED, "help": "a .safetensors file; default: what ships"},
        "num_steps": {
            "type": integer(1),
            "help": "steps of the reverse process; default: the checkpoint's own, or all",
        },
        "sampler": {"choices": SAMPLERS, "help": "default: the checkpoint's own, ddpm of most"},
        "guidance_scale": {
            "type": guidance_scale,
            "help": f"1 to {MAX_GUIDANCE_SCALE}, 1 = off; default: the checkpoint's",
        },
        "guidance_start": {"type": integer(1), "metavar": "T", "help": "lowest timestep that is guided"},
        "guidance_stop": {"type": integer(1), "metavar": "T", "help": "highest timestep that is guided"},
        "seed": {"type": integer(0, 2**53 - 1), "default": seed, "help": f"default: {default}"},
        "batch_size": {"type": integer(1, 10_000), "default": 64, "help": "images drawn at once; default: 64"},
        "compile": {
            "nargs": 0,
            "const": True,
            "default": False,
            "help": "compile first, which pays for thousands of images",
        },
        "num_threads": {"type": integer(1, 1024), "help": "compute threads on a CPU"},
    }
    for name, how in options.items():
        option = f"--{name.replace('_', '-')}"
        if option in without:
            parser.set_defaults(**{name: None})
        else:
            parser.add_argument(option, action=_Given, **how)
    parser.set_defaults(given=())
