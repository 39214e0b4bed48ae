"""Generates a data set of digits: `python -m scripts.make_dataset --out synthetic --sampler dpmpp --num-steps 20`.

Writes MNIST's IDX files, PNGs in folders 0 to 9, or a Parquet file for the Hugging Face Hub, and a card (README.md). A
stopped run continues if it is started again with the same arguments. The images are the same as those of a run that was
not stopped.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from scripts.common.arguments import Parser, add_drawing_arguments, from_arguments, integer, positive
from scripts.common.drawing import DrawingRequest, check_options
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.dataset import DatasetRequest, OpenEngine, equal_numbers, local_engine, make_dataset

MAX_IMAGES = 1_000_000


@reports_errors("make_dataset")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, generates the images and writes the data set."""
    args = build_parser().parse_args(argv)
    request = from_arguments(DrawingRequest, args)
    check_options(request)
    open_engine = engine_of(args)
    if args.format == "parquet":
        require_installed("pyarrow", extra="parquet")
    wanted = DatasetRequest(args.balance or equal_numbers(args.count), args.format, args.min_confidence)
    with Reporter(lambda: "make_dataset: stopped. Run the same command again to continue") as reporter:
        make_dataset(request, wanted, args.out, reporter, open_engine)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.make_dataset", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the data set; an unfinished data set in it is continued"
    )
    numbers = parser.add_mutually_exclusive_group()
    numbers.add_argument(
        "--count",
        type=integer(1, MAX_IMAGES),
        default=60_000,
        help="number of images, the same number of each digit; if it is not a multiple of 10, the first digits get one "
        "more; default: 60000",
    )
    numbers.add_argument(
        "--balance",
        type=balance,
        metavar="DIGIT=IMAGES,...",
        help="number of images of each digit, for example 0=100,1=250,7=1000. The other digits get no images. Cannot "
        "be used with --count",
    )
    parser.add_argument(
        "--format",
        choices=["idx", "png", "parquet"],
        default="idx",
        help="file format. idx: MNIST's; png: PNGs in folders 0 to 9; parquet: for the Hugging Face Hub; default: idx",
    )
    parser.add_argument(
        "--min-confidence",
        type=confidence,
        metavar="P",
        help="keep an image only if the judge, a classifier, gives the requested digit at least this probability. A "
        "clear digit gets about 0.96. Dropped images are replaced. The filter reduces the diversity; default: keep all",
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where the images are generated. local: in this process; ray: by workers on the hosts of a Ray cluster, "
        "with the same bytes; needs the extra ray-data; default: local",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="address of the Ray cluster; default: RAY_ADDRESS, or a Ray that runs on this machine, or a new one",
    )
    parser.add_argument(
        "--workers",
        type=integer(1, 10_000),
        help="number of Ray workers; default: one for each GPU of the cluster, or without GPUs one for each "
        "--num-threads CPUs (one CPU if --num-threads is not given)",
    )
    add_drawing_arguments(parser, seed=0)
    return parser


def engine_of(args: argparse.Namespace) -> OpenEngine:
    """Returns the engine of --engine. Imports Ray only for `ray`. Raises ScriptError for options of another engine."""
    if args.engine == "local":
        if args.ray_address or args.workers:
            raise ScriptError("--ray-address and --workers need --engine ray")
        return local_engine
    require_installed("ray", "pandas", "pyarrow", extra="ray-data")
    from scripts.evaluation.dataset_ray import ray_engine

    return partial(ray_engine, address=args.ray_address, num_workers=args.workers)


def balance(text: str) -> tuple[int, ...]:
    """Argparse type of --balance. Returns the number of images of each digit."""
    numbers: dict[int, int] = {}
    for item in text.split(","):
        found = re.fullmatch(r"([0-9])=([0-9]{1,7})", item)
        if not found or int(found[1]) in numbers:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of different digits with numbers of images, such as 0=100,1=250,7=1000"
            )
        numbers[int(found[1])] = int(found[2])
    if not 1 <= sum(numbers.values()) <= MAX_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} has {sum(numbers.values())} images, not 1 to {MAX_IMAGES}")
    return tuple(numbers.get(digit, 0) for digit in range(NUM_CLASSES))


def confidence(text: str) -> float:
    """Argparse type of --min-confidence."""
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


if __name__ == "__main__":
    main()
