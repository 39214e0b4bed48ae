"""Command-line arguments that several scripts share. A wrong argument exits with status 2 and a one-line message."""

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from model.prompts import MAX_PROMPT_LENGTH, is_prompt
from model.spec import MAX_CLIP_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE, SAMPLERS, SHIPPED
from scripts.common.data.data_set import LARGEST_IMAGE, SIZE_UNIT, USUAL_IMAGE
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES

COMPILE_MODES = ("auto", "on", "off")
DEFAULT_COMPILE = "auto"
SHIPPED_NAME = "/".join(SHIPPED.parts[-3:])  # model/weights/default.safetensors
CLIP_MODEL_HELP = (
    "a folder in open_clip's format, ARCHITECTURE:TAG or ARCHITECTURE:FILE (for OpenAI's weights: "
    "ViT-B-32-quickgelu:FILE); default: the small model that ships with unfog"
)
OWN_DATA_HELP = (
    "a folder or a zip file with a folder of pictures for each class, Parquet files of the Hugging Face Hub, an NPZ "
    "file in the layout of MedMNIST, or IDX files"
)
CLIP_GUIDANCE = ("--clip-guidance-scale", "--clip-prompt", "--clip-model")  # the drawing options of CLIP guidance
Request = TypeVar("Request")


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Prints the message to stderr and exits with status 2."""
        print(f"{self.prog}: {message} (--help shows all arguments)", file=sys.stderr)
        sys.exit(2)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns an argparse type for integers from `low` to `high`, or without an upper limit if `high` is None."""
    wanted = f"an integer from {low} to {high}" if high is not None else f"an integer of {low} or more"

    def parse(text: str) -> int:
        # int() would also accept 1_000 and Arabic-Indic digits. No argument needs more than 20 digits.
        if not (text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= (high or int(text))):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return int(text)

    return parse


def num_images(low: int, high: int) -> Callable[[str], int]:
    """Returns an argparse type for a number of images that can be divided evenly among the digits."""
    parse = integer(low, high)

    def parse_multiple(text: str) -> int:
        if parse(text) % NUM_CLASSES:
            raise argparse.ArgumentTypeError(
                f"{text} is not a multiple of {NUM_CLASSES}. Each digit needs the same number of images"
            )
        return parse(text)

    return parse_multiple


def file_to_write(suffix: str) -> Callable[[str], Path]:
    """Returns an argparse type for the path of an output file with this suffix, such as `.png`."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text} does not end in {suffix}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder")
        return path

    return parse


def positive(text: str) -> float:
    """Argparse type for a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def guidance_scale(text: str) -> float:
    """Argparse type of --guidance-scale."""
    value = _number(text)
    if not 1 <= value <= MAX_GUIDANCE_SCALE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_GUIDANCE_SCALE}")
    return value


def scale_of_clip_guidance(text: str) -> float:
    """Argparse type of --clip-guidance-scale."""
    value = _number(text)
    if not 0 <= value <= MAX_CLIP_GUIDANCE_SCALE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MAX_CLIP_GUIDANCE_SCALE}")
    return value


def interval(text: str) -> tuple[int, int]:
    """Argparse type for an interval of timesteps such as 20-80. Returns its first and last timestep."""
    start, _, stop = text.partition("-")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of timesteps. Write it like 20-80")
    return int(start), int(stop)


def clip_prompt(text: str) -> str:
    """Argparse type of --clip-prompt."""
    if not is_prompt(text):
        raise argparse.ArgumentTypeError(
            f"a prompt must have 1 to {MAX_PROMPT_LENGTH} characters and must not be blank"
        )
    return text


def setting(text: str) -> tuple[str, str]:
    """Parses NAME=VALUE, the name and the value of an environment variable of the service."""
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("UNFOG_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting. Write it like UNFOG_MAX_BATCH=8")
    return name, value


def _number(text: str) -> float:
    """Returns the number, or NaN if the text is not a number. NaN fails every range check."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def from_arguments(kind: Callable[..., Request], args: argparse.Namespace) -> Request:
    """Creates an object of the dataclass `kind` from the arguments that have the names of its fields.

    If an argument is None, or the script does not have it, the field keeps its default.
    """
    given = {name: getattr(args, name, None) for name in inspect.signature(kind).parameters}
    return kind(**{name: value for name, value in given.items() if value is not None})


class _Given(argparse.Action):
    """Stores the value and appends the option to `namespace.given`.

    The value alone does not show whether the user gave the option, because it can equal the default.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = (*namespace.given, self.dest)


def given_options(args: argparse.Namespace, *, kept: Collection[str] = ()) -> list[str]:
    """Returns the names of the drawing options that the user gave, such as `--seed`, without those in `kept`."""
    return [f"--{name.replace('_', '-')}" for name in args.given if name not in kept]


def add_drawing_arguments(
    parser: argparse.ArgumentParser,
    *,
    seed: int | None,
    clip_guidance_scale: float = 0,
    without: Collection[str] = (),
) -> None:
    """Adds the options of `drawing.DrawingRequest`.

    The options in `without` are not added. They are set to None and are rejected on the command line.
    """
    default = "random" if seed is None else str(seed)
    options: dict[str, dict[str, Any]] = {
        "checkpoint": {"type": Path, "default": SHIPPED, "help": f"a .safetensors file; default: {SHIPPED_NAME}"},
        "num_steps": {
            "type": integer(1),
            "help": "number of denoising steps; default: the number that the checkpoint recommends",
        },
        "sampler": {
            "choices": SAMPLERS,
            "help": "default: the first sampler that the checkpoint permits, usually ddpm",
        },
        "guidance_scale": {
            "type": guidance_scale,
            "help": f"scale of classifier-free guidance, 1 to {MAX_GUIDANCE_SCALE}, 1 = off; "
            "default: the scale that the checkpoint recommends",
        },
        "guidance_start": {
            "type": integer(1),
            "metavar": "T",
            "help": "lowest timestep with guidance; default: from the checkpoint",
        },
        "guidance_stop": {
            "type": integer(1),
            "metavar": "T",
            "help": "highest timestep with guidance; default: from the checkpoint",
        },
        "clip_guidance_scale": {
            "type": scale_of_clip_guidance,
            "default": float(clip_guidance_scale),
            "help": "scale of CLIP guidance: the distance by which a step moves the predicted image towards "
            f"the prompt, 0 to {MAX_CLIP_GUIDANCE_SCALE}, 0 = off; needs the extra clip; "
            f"default: {clip_guidance_scale:g}",
        },
        "clip_prompt": {
            "type": clip_prompt,
            "metavar": "TEXT",
            "help": 'prompt of CLIP guidance for all images; default: "a handwritten digit seven" for 7',
        },
        "clip_model": {"metavar": "MODEL", "help": f"the CLIP model of CLIP guidance: {CLIP_MODEL_HELP}"},
        "seed": {"type": integer(0, 2**53 - 1), "default": seed, "help": f"seed of the noise; default: {default}"},
        "batch_size": {"type": integer(1, 10_000), "default": 64, "help": "images per batch; default: 64"},
        "compile": {
            "nargs": "?",
            "const": "on",
            "choices": COMPILE_MODES,
            "default": DEFAULT_COMPILE,
            "help": "use the compiled denoising step, which is faster on a CPU. auto (default): compile on a CPU if a "
            "C++ compiler or an earlier compiled step is found; on (or --compile alone): compile, or exit with an "
            "error; off: never compile. The first compilation on a machine takes 30 to 60 s, even for a few images",
        },
        "num_threads": {"type": integer(1, 1024), "help": "number of CPU threads; default: chosen by torch"},
    }
    for name, how in options.items():
        option = f"--{name.replace('_', '-')}"
        if option in without:
            parser.set_defaults(**{name: None})
        else:
            parser.add_argument(option, action=_Given, **how)
    parser.set_defaults(given=())


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --data-dir, the folder of MNIST."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="folder with the IDX files of MNIST; downloaded into it if missing; default: data",
    )


def check_outside(out: Path, data: Path) -> None:
    """Raises ScriptError if a command with `--out` would write into the folder of the data."""
    if data.resolve() in (out.resolve(), *out.resolve().parents):
        raise ScriptError(
            f"--out {out} is in the folder of the data. Choose another one, because nothing is written into the data"
        )


def image_size(text: str) -> int:
    """Parses the width and height of images, in pixels."""
    size = integer(8, LARGEST_IMAGE)(text)
    if size % SIZE_UNIT:
        raise argparse.ArgumentTypeError(f"{size} is not a multiple of {SIZE_UNIT}")
    return size


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data, the pictures of the user, and --image-size."""
    parser.add_argument("--data", type=Path, metavar="PATH", help=f"{OWN_DATA_HELP}; default: MNIST")
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="PIXELS",
        help=f"width and height of the images of --data: a multiple of {SIZE_UNIT} from 8 to {LARGEST_IMAGE}; default: "
        f"that of the pictures if they are squares of the same size, otherwise {USUAL_IMAGE}",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `training.loop.TrainingRequest`, except --preset."""
    parser.add_argument("--out", type=Path, required=True, help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--epochs", type=integer(1), help="number of epochs; default: from the preset")
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="MINUTES",
        help="save the state and stop after this time, but not before the end of the first epoch; default: no limit",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        default=0,
        help="seed of the weights, the order of the images and the noise; on a CPU, the same seed gives the same bits "
        "with the same PyTorch, threads and compile mode; default: 0",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto, a GPU if there is one"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES,
        default="auto",
        help="compile the training step. auto (default): on a CPU, if a compiler is found; on: compile, or exit with "
        "an error; off: never",
    )
    parser.add_argument(
        "--num-threads",
        type=integer(1, 1024),
        help="number of CPU threads of each process; default: chosen by torch, or with torchrun the cores of the host "
        "divided among its processes",
    )
