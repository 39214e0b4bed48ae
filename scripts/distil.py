"""Distils a checkpoint into one that draws in few steps: `python -m scripts.distil --out runs/fast`.

Needs no images: the teacher draws what the student learns from. Started again it goes on.
"""

import argparse
from pathlib import Path

from model.checkpoint import SHIPPED
from scripts.common.arguments import Parser, add_training_arguments, from_arguments
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.training.distillation import distil
from scripts.training.loop import TrainingRequest
from scripts.training.recipe import preset_names


@reports_errors("distil")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws the paths, trains the student, and leaves all in the run's folder."""
    args = _parse(argv)
    with Reporter("distil: stopped; start again to go on") as reporter:
        distil(from_arguments(TrainingRequest, args), args.teacher, reporter)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.distil", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--preset", default="fast", help=f"{', '.join(preset_names(of_students=True))}, or a path to a .toml file"
    )
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help="a checkpoint; default: what ships")
    add_training_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
