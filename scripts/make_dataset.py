"""Generates a data set of digits: `python -m scripts.make_dataset --out synthetic --sampler dpmpp --num-steps 20`.

Writes MNIST's IDX files, or PNGs in folders 0 to 9. Image i shows the digit i mod 10. A stopped run continues if it is
started again with the same arguments. The images are the same as those of a run that was not stopped.
"""

from pathlib import Path

from scripts.common.arguments import Parser, add_drawing_arguments, from_arguments, integer
from scripts.common.drawing import DrawingRequest
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.evaluation.dataset import make_dataset


@reports_errors("make_dataset")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, generates the images and writes the data set."""
    args = build_parser().parse_args(argv)
    request = from_arguments(DrawingRequest, args)
    with Reporter("make_dataset: stopped. Run the same command again to continue") as reporter:
        make_dataset(request, args.out, reporter, count=args.count, form=args.format)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.make_dataset", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the data set; an unfinished data set in it is continued"
    )
    parser.add_argument("--count", type=integer(1, 1_000_000), default=60_000, help="number of images; default: 60000")
    parser.add_argument(
        "--format", choices=["idx", "png"], default="idx", help="file format, idx is MNIST's; default: idx"
    )
    add_drawing_arguments(parser, seed=0)
    return parser


if __name__ == "__main__":
    main()
