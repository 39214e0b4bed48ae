"""Command-line arguments that several scripts share. A wrong argument exits with status 2 and one sentence."""

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from model.checkpoint import SHIPPED
from model.sampler import MAX_GUIDANCE_SCALE, SAMPLERS
from scripts.common.mnist import NUM_CLASSES

COMPILE_MODES = ("auto", "on", "off")
DEFAULT_COMPILE = "auto"
Request = TypeVar("Request")


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
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def guidance_scale(text: str) -> float:
    """The type of --guidance-scale."""
    value = _number(text)
    if not 1 <= value <= MAX_GUIDANCE_SCALE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_GUIDANCE_SCALE}")
    return value


def _number(text: str) -> float:
    """Returns the number, or NaN, which is in no range, if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def from_arguments(kind: Callable[..., Request], args: argparse.Namespace) -> Request:
    """Returns an object of the dataclass `kind` from the arguments with its fields' names.

    An argument that is None keeps the field's default.
    """
    given = {name: getattr(args, name) for name in inspect.signature(kind).parameters}
    return kind(**{name: value for name, value in given.items() if value is not None})


class _Given(argparse.Action):
    """Stores the value, and records that the option was given, which the value alone does not show."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = (*namespace.given, self.dest)


def given_options(args: argparse.Namespace, *, kept: Collection[str] = ()) -> list[str]:
    """Returns the given options of `add_drawing_arguments` as they are typed, except those in `kept`."""
    return [f"--{name.replace('_', '-')}" for name in args.given if name not in kept]


def add_drawing_arguments(parser: argparse.ArgumentParser, *, seed: int | None, without: Collection[str] = ()) -> None:
    """Adds the options of a `drawing.DrawingRequest`.

    `without` names options that the command sets itself; they are rejected on the command line.
    """
    default = "random" if seed is None else str(seed)
    options: dict[str, dict[str, Any]] = {
        "checkpoint": {"type": Path, "default": SHIPPED, "help": "a .safetensors file; default: the shipped one"},
        "num_steps": {
            "type": integer(1),
            "help": "steps of the reverse process; default: recommended by the checkpoint, or all",
        },
        "sampler": {"choices": SAMPLERS, "help": "default: the checkpoint's first, usually ddpm"},
        "guidance_scale": {
            "type": guidance_scale,
            "help": f"classifier-free guidance, 1 to {MAX_GUIDANCE_SCALE}, 1 = off; default: the checkpoint's",
        },
        "guidance_start": {"type": integer(1), "metavar": "T", "help": "lowest timestep with guidance"},
        "guidance_stop": {"type": integer(1), "metavar": "T", "help": "highest timestep with guidance"},
        "seed": {"type": integer(0, 2**53 - 1), "default": seed, "help": f"seed of the noise; default: {default}"},
        "batch_size": {"type": integer(1, 10_000), "default": 64, "help": "images per batch; default: 64"},
        "compile": {
            "nargs": "?",
            "const": "on",
            "choices": COMPILE_MODES,
            "default": DEFAULT_COMPILE,
            "help": "draw with the compiled step, which is faster on a CPU. auto (default, as in the service): "
            "on a CPU, if a C++ compiler or a step compiled before is found; on (or --compile alone): fail if it "
            "cannot; off: never. The first run on a machine compiles for 30 to 60 s, also for a few digits; use off "
            "to avoid that",
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


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `training.loop.TrainingRequest`, except --preset."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it goes on")
    parser.add_argument("--epochs", type=integer(1), help="instead of the preset's")
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="MINUTES",
        help="stop before an epoch that, as long as those before, would not fit; the first is always made",
    )
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="same seed, same machine: same weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--compile", choices=COMPILE_MODES, default="auto", help="auto: where a compiler is found")
    parser.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
