"""Evaluates what is drawn: `python -m scripts.evaluate digits --out evaluation/`.

digits     recognised as asked, Fréchet distance, precision, recall, coverage, memorised share
fog        how long real digits are recognised on their way into the noise
clip       what CLIP sees on the way back, from static to digit
synthetic  what a classifier learns from drawn digits alone

Choices are made on the validation split; the test split is for the figures that are published.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, CheckpointError, write_atomically
from scripts.arguments import Parser, add_drawing_arguments, integer
from scripts.drawing import DrawingError, open_drawer, options_from
from scripts.evaluation import clip
from scripts.evaluation.classifiers import NUM_CLASSES, ClassifierError, load_classifier
from scripts.evaluation.clip import ClipError, ClipScorer
from scripts.evaluation.clip_path import PROMPTS, scores_along, show_scores
from scripts.evaluation.fog import lost_at, recognised_in_fog, show_fog
from scripts.evaluation.samples import (
    FEWEST_OF_EACH,
    Digits,
    SamplesError,
    balanced,
    draw_samples,
    load_references,
    read_samples,
)
from scripts.evaluation.synthetic import EPOCHS, accuracy_learned_from, read_synthetic
from scripts.figures import save_figure
from scripts.mnist import DataError
from scripts.progress import Reporter, fail, require

CLIP_HELP = "a folder in open_clip's format, ARCHITECTURE:TAG or ARCHITECTURE:FILE; default: the small one that ships"


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    try:
        with Reporter() as reporter:
            args.run(args, reporter)
    except (CheckpointError, ClassifierError, ClipError, DataError, DrawingError, SamplesError, OSError) as error:
        raise fail(f"evaluate: {error}".splitlines()[0]) from error


def _digits(args: argparse.Namespace, reporter: Reporter) -> None:
    for module in ("torchmetrics", "prdc"):
        require(module, extra="evaluate")
    from scripts.evaluation.pictures import show_confusion, show_nearest
    from scripts.evaluation.quality import Evaluator, as_json, as_markdown

    scorer = ClipScorer(args.clip) if args.clip else None
    judge, extractor = load_classifier("judge", args.judge), load_classifier("extractor", args.extractor)
    references = load_references(args.split, args.data_dir)
    digits, source = _samples(args, reporter)
    evaluator = Evaluator(references, judge, extractor, len(digits.images))
    quality, nearest = evaluator.evaluate(digits, reporter)
    table, content = as_markdown(quality, evaluator), {**source, **as_json(quality, evaluator)}
    if scorer:
        seen = scorer.score(digits), scorer.score(references.held_out)
        table, content["clip"] = f"{table}\n{clip.as_markdown(scorer, *seen)}", clip.as_json(scorer, *seen)
    reporter.line(table)
    if args.out:
        write_atomically(args.out / "evaluation.json", f"{json.dumps(content, indent=2)}\n".encode())
        write_atomically(args.out / "evaluation.md", f"{table}\n".encode())
        save_figure(show_confusion(quality.judge), args.out / "confusion.png", grey=False)
        save_figure(show_nearest(digits, nearest, references.learned.images), args.out / "nearest.png", grey=True)


def _samples(args: argparse.Namespace, reporter: Reporter) -> tuple[Digits, dict[str, Any]]:
    """The images, and where they come from."""
    if args.images:
        return read_samples(args.images), {"images": args.images.name}
    if args.num_images % NUM_CLASSES:
        raise SamplesError(f"--num-images {args.num_images} is not a multiple of 10: each digit counts alike")
    drawer = open_drawer(args)
    options = options_from(args, drawer.checkpoint)
    digits = draw_samples(
        drawer, options, reporter, num_images=args.num_images, seed=args.seed, batch_size=args.batch_size
    )
    source = {
        "checkpoint_sha256": drawer.checkpoint.sha256,
        "options": asdict(options),
        "seed": args.seed,
        "device": drawer.device.type,
        "dtype": str(drawer.dtype).removeprefix("torch."),
        "compiled": args.compile,
    }
    return digits, source


def _fog(args: argparse.Namespace, reporter: Reporter) -> None:
    schedule = checkpoint.load(args.checkpoint).schedule
    timesteps = list(range(0, schedule.num_steps + 1, max(schedule.num_steps // 50, 1)))
    digits = load_references(args.split, args.data_dir).held_out
    shares = recognised_in_fog(load_classifier("fog_judge", args.judge).network, digits, schedule, timesteps, reporter)
    for digit, t in enumerate(lost_at(timesteps, shares)):
        reporter.line(f"{digit}: fewer than half are recognised from t = {t} on")
    save_figure(show_fog(timesteps, shares), args.out, grey=False)


def _clip(args: argparse.Namespace, reporter: Reporter) -> None:
    scorer, drawer = ClipScorer(args.clip), open_drawer(args)
    real = balanced(load_references(args.split, args.data_dir).held_out, args.num_images)
    options = options_from(args, drawer.checkpoint)
    timesteps, means, of_real = scores_along(drawer, options, scorer, real, reporter, seed=args.seed)
    for prompt, first, last, beside in zip(PROMPTS, means[0], means[-1], of_real, strict=True):
        reporter.line(f"{prompt}: {first:.3f} at t = {timesteps[0]}, {last:.3f} at t = 0, real digits {beside:.3f}")
    save_figure(show_scores(args.clip, timesteps, means, of_real), args.out, grey=False)


def _synthetic(args: argparse.Namespace, reporter: Reporter) -> None:
    references = load_references(args.split, args.data_dir)
    for name, digits in (("drawn", read_synthetic(args.folder)), ("real", references.learned)):
        learned = accuracy_learned_from(digits, references.held_out, reporter, epochs=args.epochs, seed=args.seed)
        reporter.line(
            f"learned from {len(digits.labels)} {name} digits: {learned:.2%} of the {args.split} split recognised"
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="digits|fog|clip|synthetic")

    digits = commands.add_parser("digits", help="evaluate drawn digits: a table, JSON and pictures")
    digits.add_argument("--images", type=Path, help="a folder of PNGs instead of a checkpoint")
    lowest = NUM_CLASSES * FEWEST_OF_EACH
    digits.add_argument(
        "--num-images", type=integer(lowest, 50_000), default=10_000, help="a multiple of 10; default: 10000"
    )
    digits.add_argument("--out", type=Path, help="folder for evaluation.json, evaluation.md and the pictures")
    digits.add_argument("--extractor", type=Path, help="weights whose features count; default: those that ship")
    digits.add_argument("--clip", nargs="?", const="embedded", metavar="MODEL", help=f"judge by CLIP too; {CLIP_HELP}")
    add_drawing_arguments(digits, seed=0)
    digits.set_defaults(run=_digits)

    fog = commands.add_parser("fog", help="how long real digits are recognised on their way into the noise")
    fog.add_argument("--checkpoint", type=Path, default=SHIPPED, help="whose schedule; default: what ships")
    fog.add_argument("--out", type=Path, required=True, help="the .png to write")
    fog.set_defaults(run=_fog)

    clip_path = commands.add_parser("clip", help="what CLIP sees along the reverse process")
    clip_path.add_argument("--num-images", type=integer(NUM_CLASSES, 5_000), default=200, help="default: 200")
    clip_path.add_argument("--out", type=Path, required=True, help="the .png to write")
    clip_path.add_argument("--clip", default="embedded", metavar="MODEL", help=CLIP_HELP)
    add_drawing_arguments(clip_path, seed=0)
    clip_path.set_defaults(run=_clip)

    synthetic = commands.add_parser("synthetic", help="what a classifier learns from drawn digits alone")
    synthetic.add_argument("folder", type=Path, help="what scripts.make_dataset wrote, as IDX files")
    synthetic.add_argument("--epochs", type=integer(1), default=EPOCHS, help=f"default: {EPOCHS}")
    synthetic.add_argument("--seed", type=integer(0, 2**53 - 1), default=0, help="default: 0")
    synthetic.set_defaults(run=_synthetic)

    digits.add_argument("--judge", type=Path, help="weights of the judge; default: those that ship")
    fog.add_argument("--judge", type=Path, help="weights of the fog judge; default: those that ship")
    for command in (fog, synthetic):
        command.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
    for command in (digits, fog, clip_path, synthetic):
        command.add_argument(
            "--split", choices=["test", "validation"], default="test", help="the real digits beside; default: test"
        )
        command.add_argument(
            "--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing"
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
