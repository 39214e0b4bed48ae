"""Trains the small CLIP model that evaluates and guides generated digits: `python -m scripts.train_clip`.

Without --out, overwrites the tracked weights in model/weights/clip, which the service and the scripts use, or with
--for-features those in scripts/evaluation/weights/clip, which measure distances.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from model.files import write_atomically
from model.png import encode_png
from model.spec import EMBEDDED
from scripts.common.arguments import Parser, add_data_argument, integer
from scripts.common.errors import reports_errors
from scripts.common.mnist import load_mnist
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.evaluation.classifiers import CLIP_FOR_FEATURES
from scripts.evaluation.clip_training import EPOCHS, train_and_save_clip


@reports_errors("train_clip")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with Reporter(
        lambda: "train_clip: stopped; the same command starts from the beginning", stop=stops_soon
    ) as reporter:
        folder = args.out or (CLIP_FOR_FEATURES if args.for_features else EMBEDDED)
        options = {"epochs": args.epochs, "seed": args.seed, "for_features": args.for_features}
        train_and_save_clip(folder, args.data_dir, reporter, **options)
        if not args.for_features:
            save_real_digits(folder, args.data_dir)


def save_real_digits(folder: Path, data_dir: Path) -> None:
    """Writes digits.png: the first ten digits of each class of MNIST's test split, one row for each class in order.

    POST /score returns the similarities of these digits.
    """
    images, labels = load_mnist("test", data_dir)
    digits = torch.stack([images[labels == digit][:10, 0] for digit in range(10)])  # (10, 10, 28, 28)
    sheet = rearrange(digits, "digit place h w -> (digit h) (place w)")
    write_atomically(folder / "digits.png", encode_png(Image.fromarray(sheet.numpy())))


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.train_clip", description=__doc__)
    add_data_argument(parser)
    parser.add_argument(
        "--out",
        type=_folder,
        help="folder to write; default: model/weights/clip, or scripts/evaluation/weights/clip with --for-features, "
        "which are tracked and get overwritten",
    )
    parser.add_argument(
        "--for-features",
        action="store_true",
        help="leave out 1,000 training digits of each class, with which distances are measured",
    )
    parser.add_argument("--epochs", type=integer(1), default=EPOCHS, help=f"number of epochs; default: {EPOCHS}")
    parser.add_argument(
        "--seed",
        type=integer(0, 2**53 - 1),
        default=0,
        help="seed of the weights and of the order of the images; default: 0",
    )
    parser.add_argument("--num-threads", type=integer(1, 1024), help="number of CPU threads; default: chosen by torch")
    return parser


def _folder(text: str) -> Path:
    if ":" in text:
        raise argparse.ArgumentTypeError(f"{text!r} contains a colon. open_clip cannot load a model from such a path")
    return Path(text)


if __name__ == "__main__":
    main()
