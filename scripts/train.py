"""Trains a network on MNIST by a preset: `python -m scripts.train --preset default --out runs/default`.

Started again with the same arguments it goes on from the last whole epoch, bit by bit as if never stopped.
"""

import argparse
from pathlib import Path

from scripts.common.arguments import Parser, add_training_arguments, from_arguments
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.training.loop import TrainingRequest, train_on_mnist
from scripts.training.recipe import preset_names


@reports_errors("train")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, trains, and leaves the run in its folder."""
    args = _parse(argv)
    with Reporter("train: stopped; start again to go on after the last whole epoch") as reporter:
        train_on_mnist(from_arguments(TrainingRequest, args), args.data_dir, reporter)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="default", help=f"{', '.join(preset_names(of_students=False))}, or a path to a .toml file"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing")
    add_training_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
