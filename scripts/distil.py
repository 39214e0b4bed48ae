"""Distils a checkpoint into a student that needs fewer steps: `python -m scripts.distil --out runs/fast`.

Needs no data set, because the student learns from images that the teacher generates. Run the same command again to
resume.
"""

from pathlib import Path

from model.spec import SHIPPED
from scripts.common.arguments import SHIPPED_NAME, Parser, add_training_arguments, from_arguments
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.training.distillation import distil
from scripts.training.loop import TrainingRequest
from scripts.training.recipe import preset_names
from scripts.training.run import stop_message


@reports_errors("distil")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with Reporter(lambda: stop_message("distil", args.out), stop=stops_soon) as reporter:
        distil(from_arguments(TrainingRequest, args), args.teacher, reporter)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.distil", description=__doc__)
    parser.add_argument(
        "--preset",
        default="fast",
        help=f"{', '.join(preset_names(of_students=True))}, or a path to a .toml file; default: fast",
    )
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help=f"a checkpoint file; default: {SHIPPED_NAME}")
    add_training_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
