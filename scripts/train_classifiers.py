"""Trains the judges and the extractor that evaluate digits: `python -m scripts.train_classifiers judge`."""

import argparse
from pathlib import Path

import torch

from scripts.common.arguments import Parser, file_to_write, integer
from scripts.common.errors import reports_errors
from scripts.common.mnist import load_mnist, split_validation
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import KINDS, WEIGHTS, save_classifier
from scripts.evaluation.training import facts_of, train_classifier

# The extractor sees images as they are: slant, size and place are part of what it is to measure.
RECIPES = {
    "judge": {"augmented": True, "epochs": 30, "seed": 0},
    "extractor": {"augmented": False, "epochs": 20, "seed": 1},
    "fog_judge": {"augmented": True, "fogged": True, "epochs": 20, "seed": 2},
}


@reports_errors("train_classifiers")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, trains and saves."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    asked = {"epochs": args.epochs, "seed": args.seed}
    recipe = {**RECIPES[args.kind], **{name: value for name, value in asked.items() if value is not None}}
    torch.manual_seed(recipe["seed"])  # the first weights, and dropout
    path = args.out or WEIGHTS / f"{args.kind}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    train, test = (load_mnist(split, args.data_dir) for split in ("train", "test"))
    learn, choose = split_validation(*train)
    with Reporter() as reporter:
        network = train_classifier(
            KINDS[args.kind](),
            learn,
            reporter,
            augmented=bool(recipe["augmented"]),
            fogged=bool(recipe.get("fogged", False)),
            epochs=int(recipe["epochs"]),
            seed=recipe["seed"],
        )
        facts = facts_of(network, choose, test, **recipe)
        save_classifier(path, args.kind, network, facts)
        reporter.line(f"{facts['validation_accuracy']:.2%} of the validation digits recognised; saved as {path}")


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
