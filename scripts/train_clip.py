"""Trains the small CLIP that judges digits: `python -m scripts.train_clip`."""

import argparse
from pathlib import Path

import torch

from scripts.common.arguments import Parser, integer
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.evaluation.clip import EMBEDDED
from scripts.evaluation.clip_training import EPOCHS, train_and_save_clip


@reports_errors("train_clip")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, trains, saves, and measures what was saved on real test digits."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with Reporter() as reporter:
        train_and_save_clip(args.out, args.data_dir, reporter, epochs=args.epochs, seed=args.seed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.train_clip", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing")
    parser.add_argument("--out", type=_folder, default=EMBEDDED, help="folder; default: where `scripts.evaluate` looks")
    parser.add_argument("--epochs", type=integer(1), default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=integer(0, 2**53 - 1), default=0, help="default: 0")
    parser.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    if ":" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a colon: a model of that name could not be loaded again")
    return Path(text)


if __name__ == "__main__":
    main()
