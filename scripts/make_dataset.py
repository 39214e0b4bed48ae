"""Draws a data set of digits: `python -m scripts.make_dataset --out synthetic --sampler dpmpp --num-steps 20`.

Writes MNIST's IDX files, or PNGs in folders 0 to 9. Image i is of digit i mod 10. A run that was stopped continues
when it is started again with the same arguments, and the result is the same as without the stop.
"""

import argparse
from pathlib import Path

from scripts.common.arguments import Parser, add_drawing_arguments, from_arguments, integer
from scripts.common.drawing import DrawingRequest
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.evaluation.dataset import make_dataset


@reports_errors("make_dataset")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws the images and writes the data set."""
    args = _parse(argv)
    request = from_arguments(DrawingRequest, args)
    with Reporter("make_dataset: stopped; start again to go on") as reporter:
        make_dataset(request, args.out, reporter, count=args.count, form=args.format)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.make_dataset", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; an unfinished set continues")
    parser.add_argument("--count", type=integer(1, 1_000_000), default=60_000, help="images; default: 60000")
    parser.add_argument("--format", choices=["idx", "png"], default="idx", help="default: idx, MNIST's file format")
    add_drawing_arguments(parser, seed=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
