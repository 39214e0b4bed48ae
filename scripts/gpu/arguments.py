"""The command line of `python -m scripts.gpu`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu.sections import SECTIONS

LONGEST_SECONDS = 600.0
DESCRIPTION = "Check and measure the service on a GPU. Without a GPU, the sections that need one are skipped."
EPILOG = """The exit status is 0 if no section and no check failed, otherwise 1. A section that was not run because of
the time limit counts as failed. A missed target is not a failure."""


def build_parser() -> argparse.ArgumentParser:
    sections = "\n".join(f"  {section.name.ljust(18)}{section.text}" for section in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu",
        description=f"{DESCRIPTION}\n\nsections:\n{sections}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sections",
        type=_sections,
        action="extend",
        default=[],
        metavar="A,B",
        help="run only these sections, separated by commas (default: all)",
    )
    parser.add_argument(
        "--out",
        type=_file,
        default=Path("gpu_check.json"),
        metavar="FILE",
        help="file for the results (default: gpu_check.json). With several interpreters, gpu_check-1.json and so on",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=LONGEST_SECONDS,
        help=f"time limit of all sections together, for each interpreter (default: {LONGEST_SECONDS:.0f})",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="Python interpreter to use. Repeat the argument to compare versions of torch (default: this interpreter)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="checkpoint to measure (default: the shipped one)"
    )
    parser.add_argument(
        "--device", type=_device, default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of the network (default: auto)",
    )
    parser.add_argument("--section", choices=[section.name for section in SECTIONS], help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    return parser


def as_arguments(given: argparse.Namespace, device: str) -> list[str]:
    """Returns the arguments for the process of a section. The section and the file for its figures are added later."""
    checkpoint = ["--checkpoint", str(given.checkpoint.resolve())] if given.checkpoint else []
    return [*checkpoint, "--device", device, "--dtype", given.dtype]


def interpreters(given: argparse.Namespace) -> Sequence[str]:
    return given.python or [sys.executable]


def outputs(given: argparse.Namespace) -> list[Path]:
    """Returns the file for the results of each interpreter."""
    path: Path = given.out
    count = len(interpreters(given))
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{n}") for n in range(1, 1 + count)]


def _sections(text: str) -> list[Any]:
    by_name = {section.name: section for section in SECTIONS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in by_name]:
        raise argparse.ArgumentTypeError(f"unknown section {unknown[0]!r}. The sections are {', '.join(by_name)}")
    if not names:
        raise argparse.ArgumentTypeError("name at least one section")
    return [by_name[name] for name in names]


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}. Create it or name another file")
    return path


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {LONGEST_SECONDS:.0f}")
    return seconds
