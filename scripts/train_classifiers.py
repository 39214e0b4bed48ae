"""Trains the judges and the extractor that evaluate digits: `python -m scripts.train_classifiers judge`."""

import argparse
from pathlib import Path

import torch

from scripts.common.arguments import Parser, file_to_write, integer
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.evaluation.classifier_training import RECIPES, train_and_save
from scripts.evaluation.classifiers import KINDS, WEIGHTS


@reports_errors("train_classifiers")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, trains and saves."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    path = args.out or WEIGHTS / f"{args.kind}.safetensors"
    with Reporter() as reporter:
        train_and_save(args.kind, path, args.data_dir, reporter, epochs=args.epochs, seed=args.seed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.train_classifiers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=sorted(KINDS), help="which of them")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing")
    parser.add_argument(
        "--out",
        type=file_to_write(".safetensors"),
        help="a .safetensors file; default: where `scripts.evaluate` looks for it",
    )
    parser.add_argument("--epochs", type=integer(1), help=f"default: {_each('epochs')}")
    parser.add_argument("--seed", type=integer(0, 2**53 - 1), help=f"default: {_each('seed')}")
    parser.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
    return parser.parse_args(argv)


def _each(part: str) -> str:
    return ", ".join(f"{recipe[part]} for the {kind}" for kind, recipe in RECIPES.items())


if __name__ == "__main__":
    main()
