"""Trains the classifiers that evaluate generated digits: `python -m scripts.train_classifiers judge`.

Without --out, overwrites the tracked weights in scripts/evaluation/weights, which scripts.evaluate uses.
"""

import torch

from scripts.common.arguments import Parser, add_data_argument, file_to_write, integer
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.evaluation.classifier_training import RECIPES, train_and_save
from scripts.evaluation.classifiers import KINDS, WEIGHTS


@reports_errors("train_classifiers")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    path = args.out or WEIGHTS / f"{args.kind}.safetensors"
    with Reporter(
        lambda: "train_classifiers: stopped; the same command starts from the beginning", stop=stops_soon
    ) as reporter:
        train_and_save(args.kind, path, args.data_dir, reporter, epochs=args.epochs, seed=args.seed)


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.train_classifiers", description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS), help="the classifier to train")
    add_data_argument(parser)
    parser.add_argument(
        "--out",
        type=file_to_write(".safetensors"),
        help="the .safetensors file to write; default: scripts/evaluation/weights/KIND.safetensors, "
        "which is tracked and gets overwritten",
    )
    parser.add_argument("--epochs", type=integer(1), help=f"number of epochs; default: {_each('epochs')}")
    parser.add_argument(
        "--seed",
        type=integer(0, 2**53 - 1),
        help=f"seed of the weights and of the order of the images; default: {_each('seed')}",
    )
    parser.add_argument("--num-threads", type=integer(1, 1024), help="number of CPU threads; default: chosen by torch")
    return parser


def _each(part: str) -> str:
    return ", ".join(f"{recipe[part]} for the {kind}" for kind, recipe in RECIPES.items())


if __name__ == "__main__":
    main()
