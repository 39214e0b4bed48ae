"""Trains a network on MNIST with a preset: `python -m scripts.train --preset default --out runs/default`.

Run the same command again to resume from the last complete epoch. On a CPU, the result has the same bits as an
uninterrupted run.
"""

from scripts.common.arguments import Parser, add_data_argument, add_training_arguments, from_arguments
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.training.loop import TrainingRequest, train_on_mnist
from scripts.training.recipe import preset_names
from scripts.training.run import stop_message


@reports_errors("train")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with Reporter(lambda: stop_message("train", args.out), stop=stops_soon) as reporter:
        train_on_mnist(from_arguments(TrainingRequest, args), args.data_dir, reporter)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.train", description=__doc__)
    parser.add_argument(
        "--preset",
        default="default",
        help=f"{', '.join(preset_names(of_students=False))}, or a path to a .toml file; default: default",
    )
    add_data_argument(parser)
    add_training_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
