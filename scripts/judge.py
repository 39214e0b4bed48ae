"""Judges drawn digits: `python -m scripts.judge score` counts those that an independent classifier recognises.

`python -m scripts.judge train` makes that classifier from MNIST's training split.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import CheckpointError, write_atomically
from scripts.arguments import Parser, add_drawing_arguments, integer
from scripts.drawing import Drawer, DrawingError, DrawingOptions, open_drawer, options_from
from scripts.judge_net import NUM_CLASSES, WEIGHTS, Judge, JudgeError, load_judge, recognise, save_judge
from scripts.judge_training import train_judge
from scripts.mnist import DataError, load_mnist
from scripts.pictures import to_pixels
from scripts.progress import Reporter, fail


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the drawn digits were recognised as what was asked for."""

    num_images: int
    recognised: float  # share of all images
    per_digit: tuple[float, ...]  # share of the images of each digit
    mistakes: dict[str, int]  # "4 as 9" -> how often, the most frequent first

    @property
    def worst_digit(self) -> int:
        """The digit with the smallest share."""
        return self.per_digit.index(min(self.per_digit))


def score(asked: Tensor, seen: Tensor) -> Score:
    """Digits asked for and digits seen, (N,) each, every digit asked for at least once."""
    right = (asked == seen).double()  # (N,)
    per_digit = tuple(right[asked == digit].mean().item() for digit in range(NUM_CLASSES))
    wrong = torch.stack([asked, seen], dim=1)[asked != seen]  # (M, 2)
    pairs, counts = wrong.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True).tolist()
    mistakes = {f"{pairs[i, 0].item()} as {pairs[i, 1].item()}": int(counts[i].item()) for i in order}
    return Score(len(asked), right.mean().item(), per_digit, mistakes)


def score_drawer(
    drawer: Drawer,
    options: DrawingOptions,
    judge: Judge,
    reporter: Reporter,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
) -> Score:
    """Draws num_images digits, as many of each, and has them judged in 8 bits, as they would be served."""
    if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
        raise JudgeError("this checkpoint does not draw digits of 1x28x28, and the judge knows nothing else")
    index = torch.arange(num_images)
    asked = index % NUM_CLASSES  # (N,)
    x_0 = drawer.draw(asked, index, options, reporter, seed=seed, batch_size=batch_size)
    return score(asked, recognise(judge.network, to_pixels(x_0)))


def describe(result: Score, judge: Judge) -> str:
    """The score in words, a line each."""
    worst, per_digit = result.worst_digit, result.per_digit
    mistakes = ", ".join(f"{pair}: {count}" for pair, count in list(result.mistakes.items())[:5])
    return "\n".join(
        [
            f"recognised as asked   {result.recognised:.2%} of {result.num_images}",
            *(f"  {digit}                   {share:.2%}" for digit, share in enumerate(per_digit)),
            f"worst digit           {worst}, {per_digit[worst]:.2%}",
            f"most frequent errors  {mistakes or 'none'}",
            f"the judge itself      {judge.accuracy:.2%} of {judge.facts['num_test']} real test digits",
        ]
    )


def as_json(result: Score, drawer: Drawer, options: DrawingOptions, judge: Judge, seed: int) -> dict[str, Any]:
    """The score with all that it depends on."""
    return {
        **asdict(result),
        "worst_digit": result.worst_digit,
        "checkpoint_sha256": drawer.checkpoint.sha256,
        "options": asdict(options),
        "seed": seed,
        "device": drawer.device.type,
        "dtype": str(drawer.dtype).removeprefix("torch."),
        "judge": {"sha256": judge.sha256, "test_accuracy": judge.accuracy},
    }


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = _parse(argv)
    try:
        with Reporter() as reporter:
            args.run(args, reporter)
    except (CheckpointError, DataError, DrawingError, JudgeError, OSError) as error:
        raise fail(f"judge: {error}".splitlines()[0]) from error


def _train(args: argparse.Namespace, reporter: Reporter) -> None:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    train, test = (load_mnist(split, args.data_dir) for split in ("train", "test"))
    network, facts = train_judge(train, test, reporter, epochs=args.epochs, seed=args.seed)
    save_judge(args.out, network, facts)
    reporter.line(f"{facts['test_accuracy']:.2%} of the test digits recognised; saved as {args.out}")


def _score(args: argparse.Namespace, reporter: Reporter) -> None:
    if args.num_images % NUM_CLASSES:
        raise JudgeError(f"--num-images {args.num_images} is not a multiple of {NUM_CLASSES}: each digit counts alike")
    judge, drawer = load_judge(args.judge), open_drawer(args)
    options = options_from(args, drawer.checkpoint)
    result = score_drawer(
        drawer, options, judge, reporter, num_images=args.num_images, seed=args.seed, batch_size=args.batch_size
    )
    reporter.line(describe(result, judge))
    if args.out:
        content = json.dumps(as_json(result, drawer, options, judge, args.seed), indent=2)
        write_atomically(args.out, f"{content}\n".encode())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.judge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="train|score")

    train = commands.add_parser("train", help="train the judge", description="Trains the judge on MNIST.")
    train.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing")
    train.add_argument("--out", type=Path, default=WEIGHTS, help="default: the judge that `score` uses")
    train.add_argument("--epochs", type=integer(1), default=14, help="default: 14")
    train.add_argument("--seed", type=integer(0, 2**53 - 1), default=0, help="default: 0")
    train.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
    train.set_defaults(run=_train)

    judge = commands.add_parser("score", help="draw digits and judge them", description="Draws digits and judges them.")
    judge.add_argument(
        "--num-images", type=integer(10, 1_000_000), default=2000, help="a multiple of 10; default: 2000"
    )
    add_drawing_arguments(judge, seed=0)
    judge.add_argument("--judge", type=Path, default=WEIGHTS, help="weights that judge; default: those that ship")
    judge.add_argument("--out", type=Path, help="a .json file for the score")
    judge.set_defaults(run=_score)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
