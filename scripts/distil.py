"""Distils a checkpoint into a student that needs fewer steps: `python -m scripts.distil --out runs/fast`.

The student learns from images that the teacher generates, and from the data of the teacher's training: your own
pictures with --data, otherwise MNIST. Run the same command again to resume.
"""

from functools import partial
from pathlib import Path

from model.spec import SHIPPED
from scripts.common.arguments import (
    SHIPPED_NAME,
    Parser,
    add_data_argument,
    add_own_data_arguments,
    add_training_arguments,
    check_outside,
    from_arguments,
)
from scripts.common.data.data_set import load_data
from scripts.common.errors import reports_errors
from scripts.common.mnist import mnist_data
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.training.distillation import distil
from scripts.training.loop import TrainingRequest
from scripts.training.recipe import preset_names
from scripts.training.run import stop_message


@reports_errors("distil")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.image_size and not args.data:
        parser.error("--image-size needs --data")
    if args.data:
        check_outside(args.out, args.data)
    with Reporter(lambda: stop_message("distil", args.out), stop=stops_soon) as reporter:
        load = (
            partial(load_data, args.data, reporter, args.image_size)
            if args.data
            else partial(mnist_data, args.data_dir)
        )
        distil(from_arguments(TrainingRequest, args), args.teacher, load, reporter)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.distil", description=__doc__)
    add_own_data_arguments(parser)
    parser.add_argument("--flip", action="store_true", help="mirror real images at random; use it if the teacher did")
    parser.add_argument(
        "--preset",
        default="fast",
        help=f"{', '.join(preset_names(of_students=True))}, or a path to a .toml file; default: fast",
    )
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help=f"a checkpoint file; default: {SHIPPED_NAME}")
    add_data_argument(parser)
    add_training_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
