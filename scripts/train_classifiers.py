"""Trains the classifiers that evaluate generated images: `python -m scripts.train_classifiers judge`.

Without --out, it overwrites the tracked weights in scripts/evaluation/weights, which scripts.evaluate uses. --data
needs --out.
"""

import torch

from model.compiled.memory import keep_freed_memory
from scripts.common.arguments import (
    Parser,
    add_data_argument,
    add_own_data_arguments,
    check_outside,
    file_to_write,
    integer,
)
from scripts.common.data.data_set import load_data
from scripts.common.errors import reports_errors
from scripts.common.progress import Reporter
from scripts.common.stopping import stops_soon
from scripts.evaluation.classifier_training import RECIPES, all_of_mnist, own_data_for, recipe_for, train_and_save
from scripts.evaluation.classifiers import DIGITS_SHAPE, KINDS, WEIGHTS


@reports_errors("train_classifiers")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.data and not args.out:
        parser.error("--data needs --out, the file to write")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    if args.data:
        check_outside(args.out, args.data)
    path = args.out or WEIGHTS / f"{args.kind}.safetensors"
    with Reporter(
        lambda: "train_classifiers: stopped; the same command starts from the beginning", stop=stops_soon
    ) as reporter:
        if args.data:
            data = own_data_for(args.kind, load_data(args.data, reporter, args.image_size))
        else:
            data = all_of_mnist(args.kind, args.data_dir)
        given = {"epochs": args.epochs, "seed": args.seed, "width": args.width, "flip": args.flip or None}
        train_and_save(args.kind, path, data, reporter, recipe_for(args.kind, data, **given))


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.train_classifiers", description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS), help="the classifier to train")
    add_data_argument(parser)
    add_own_data_arguments(parser)
    parser.add_argument(
        "--out",
        type=file_to_write(".safetensors"),
        help="the .safetensors file to write, required with --data; default: "
        "scripts/evaluation/weights/KIND.safetensors, which is tracked and gets overwritten",
    )
    parser.add_argument(
        "--epochs",
        type=integer(1),
        help=f"number of epochs; default: {_each('epochs')} on MNIST, chosen for other data",
    )
    parser.add_argument(
        "--width",
        type=integer(8, 512),
        help=f"channels of the first layer; default: {DIGITS_SHAPE.width}",
    )
    parser.add_argument(
        "--flip", action="store_true", help="mirror each training image with probability 0.5; not for digits or letters"
    )
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
