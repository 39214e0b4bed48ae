"""Trains a network on your own pictures or on MNIST: `python -m scripts.train --data pictures --out runs/pictures`.

Without --data it trains on MNIST, which it downloads. Run the same command again to resume from the last saved state.
On a CPU, the result has the same bits as an uninterrupted run.
"""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from scripts.common.arguments import (
    Parser,
    add_data_argument,
    add_own_data_arguments,
    add_training_arguments,
    check_outside,
    from_arguments,
    integer,
)
from scripts.common.data.data_set import DataSet, load_data
from scripts.common.data.first_look import lines_about
from scripts.common.errors import reports_errors
from scripts.common.mnist import mnist_data
from scripts.common.progress import Reporter
from scripts.common.stopping import Say, stops_soon
from scripts.training.auto import AUTO
from scripts.training.loop import TrainingRequest, train_on
from scripts.training.processes import Processes, processes_of_environment
from scripts.training.recipe import preset_names
from scripts.training.run import stop_message


@reports_errors("train")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.image_size and not args.data:
        parser.error("--image-size needs --data")
    if args.data:
        check_outside(args.out, args.data)
    args.preset = args.preset or (AUTO if args.data else "default")
    processes = processes_of_environment()
    with processes.quiet(), new_reporter(args.out, processes) as reporter:
        load = partial(own_data, args.data, args.image_size, args.limit, reporter)
        load = load if args.data else partial(mnist, args.data_dir, args.limit, processes)
        train_on(from_arguments(TrainingRequest, args), load, reporter, processes)


def new_reporter(out: Path, processes: Processes) -> Reporter:
    """Returns a reporter that says how a stopped run can be resumed, in the first process only."""

    def stop(say: Say) -> AbstractContextManager[None]:
        return stops_soon(say if processes.is_first else lambda number: None)

    return Reporter(lambda: stop_message("train", out), stop=stop)


def mnist(folder: Path, limit: int | None, processes: Processes) -> DataSet:
    """Loads MNIST with at most `limit` training images of each class. None means all. Raises ScriptError.

    Of several processes, only one downloads it to a folder.
    """
    return processes.in_turn(partial(mnist_data, folder)).limited(limit)


def own_data(path: Path, image_size: int | None, limit: int | None, reporter: Reporter) -> DataSet:
    """Loads the pictures of the user like `mnist`, and says what they are. Raises ScriptError."""
    data = load_data(path, reporter, image_size).limited(limit)
    for line in lines_about(data):
        reporter.line(line)
    return data


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.train", description=__doc__)
    add_own_data_arguments(parser)
    parser.add_argument(
        "--flip", action="store_true", help="mirror each training image with probability 0.5; not for digits or letters"
    )
    parser.add_argument(
        "--limit",
        type=integer(2),
        metavar="IMAGES",
        help="use at most this number of training images of each class, to try a run quickly; default: all",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write losses and images for TensorBoard into the run folder; needs the extra tensorboard",
    )
    parser.add_argument(
        "--preset",
        help=f"{', '.join(preset_names(of_students=False))}, a path to a .toml file, or {AUTO}, which chooses one for "
        f"the data; default: {AUTO} with --data, otherwise default",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint whose weights the training starts with. The learning rate starts again as in the preset, and "
        "network, noise schedule and prediction must be those of the preset; default: random weights",
    )
    add_data_argument(parser)
    add_training_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
