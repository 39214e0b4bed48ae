"""Evaluates drawn digits: `python -m scripts.evaluate digits --out evaluation/`.

digits     recognition accuracy, Fréchet distance, precision, recall, coverage, share of memorised digits
fog        recognition of real digits at each noise level
clip       CLIP scores at each step of the reverse process
synthetic  accuracy of a classifier that was trained on drawn digits only

Use the validation split to make choices and the test split for published figures.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, write_atomically
from scripts.common.arguments import Parser, add_drawing_arguments, file_to_write, given_options, integer, num_images
from scripts.common.drawing import open_drawer, options_from
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.figures import save_figure
from scripts.common.files import write_json
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation import clip
from scripts.evaluation.classifiers import Trained, load_classifier
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.clip_path import LINES, scores_along, show_scores
from scripts.evaluation.fog import lost_at, recognised_in_fog, show_fog
from scripts.evaluation.samples import (
    FEWEST_OF_EACH,
    HELD_OUT_SPLITS,
    MOST_IMAGES,
    SPLITS,
    Digits,
    balanced,
    draw_samples,
    load_references,
    read_facts,
    read_samples,
)
from scripts.evaluation.synthetic import EPOCHS, accuracy_learned_from
from scripts.evaluation.tables import FEWEST_IMAGES

SOURCE = ("weights_sha256", "options", "seed", "device", "dtype", "compiled")  # what decides the images
NUM_IMAGES = 10_000
PICTURE_HELP = "the .png file to write; the figures are written to a .json file of the same name"
CLIP_HELP = (
    "a folder in open_clip's format, ARCHITECTURE:TAG or ARCHITECTURE:FILE (for OpenAI's weights: "
    "ViT-B-32-quickgelu:FILE); default: the small model that ships"
)


@reports_errors("evaluate")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = _parse(argv)
    require_installed(*args.packages, extra="evaluate")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with Reporter() as reporter:
        args.run(args, reporter)


def _digits(args: argparse.Namespace, reporter: Reporter) -> None:
    from scripts.evaluation.pictures import show_confusion, show_nearest
    from scripts.evaluation.quality import Evaluator, as_json, as_markdown, notes_of

    # All that can fail fails before anything is drawn.
    scorer = ClipScorer(args.clip) if args.clip else None
    judge, extractor = load_classifier("judge", args.judge), load_classifier("extractor", args.extractor)
    num_images, draw = (_folder if args.images else _checkpoint)(args, reporter)
    references = load_references(args.split, args.data_dir)
    evaluator = Evaluator(references, judge, extractor, num_images)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    digits, source = draw()
    quality, nearest = evaluator.evaluate(digits, reporter)
    table, content = as_markdown(quality), {**source, **as_json(quality, evaluator)}
    if scorer:
        real = references.held_out
        of_real = scorer.score(real)
        seen = scorer.score(digits), of_real, scorer.tells_noise(real, of_real)
        table, content["clip"] = f"{table}\n{clip.as_markdown(scorer, *seen)}", clip.as_json(scorer, *seen)
    table = "\n\n".join([table, *notes_of(quality)])
    reporter.line(table)
    if args.out:
        write_json(args.out / "evaluation.json", content)
        write_atomically(args.out / "evaluation.md", f"{table}\n".encode())
        save_figure(show_confusion(quality.judge), args.out / "confusion.png", grey=False)
        save_figure(show_nearest(digits, nearest, references.learned.images), args.out / "nearest.png", grey=True)


Samples = tuple[int, Callable[[], tuple[Digits, dict[str, Any]]]]  # their number; gets them, and their source


def _folder(args: argparse.Namespace, reporter: Reporter) -> Samples:
    given = given_options(args, kept=["num_threads"])  # which the evaluation uses too
    if given:
        raise ScriptError(f"--images are drawn already: leave out {given[0]}")
    read, facts = read_samples(args.images), read_facts(args.images)
    fewest = int(read.labels.bincount(minlength=NUM_CLASSES).min())
    digits = balanced(read, args.num_images or min(NUM_IMAGES, NUM_CLASSES * fewest))
    if len(digits.labels) < len(read.labels):
        reporter.line(f"the first {len(digits.labels) // NUM_CLASSES} of each digit, of {len(read.labels)} images")
    known = {name: facts[name] for name in SOURCE if name in facts}
    return len(digits.labels), lambda: (digits, {"images": args.images.name, **known})


def _checkpoint(args: argparse.Namespace, reporter: Reporter) -> Samples:
    drawer, count = open_drawer(args), args.num_images or NUM_IMAGES
    options = options_from(args, drawer.checkpoint)

    def draw() -> tuple[Digits, dict[str, Any]]:
        drawer.compile(args.compile, reporter)
        source = {**drawer.facts, "options": asdict(options), "seed": args.seed}
        given = {"num_images": count, "seed": args.seed, "batch_size": args.batch_size}
        return draw_samples(drawer, options, reporter, **given), source

    return count, draw


def _fog(args: argparse.Namespace, reporter: Reporter) -> None:
    schedule = checkpoint.load(args.checkpoint).schedule
    timesteps = list(range(0, schedule.num_steps + 1, max(schedule.num_steps // 50, 1)))
    digits, judge = load_references(args.split, args.data_dir).held_out, load_classifier("fog_judge", args.judge)
    recognised, shares = recognised_in_fog(judge.network, digits, schedule, timesteps, reporter)
    lost = lost_at(timesteps, shares)
    for digit, t in enumerate(lost):
        reporter.line(f"{digit}: {'never lost' if t is None else f'half are lost from t = {t} on'}")
    save_figure(show_fog(timesteps, shares), args.out, grey=False)
    content = {
        "split": args.split,
        "judge": _of(judge),
        "t": timesteps,
        "recognised": recognised.T.tolist(),
        "told": shares.T.tolist(),
        "half_lost_at": lost,
    }
    write_json(args.out.with_suffix(".json"), content)


def _clip(args: argparse.Namespace, reporter: Reporter) -> None:
    scorer, drawer = ClipScorer(args.clip), open_drawer(args)
    real = balanced(load_references(args.split, args.data_dir).held_out, args.num_images)
    options = options_from(args, drawer.checkpoint)
    drawer.compile(args.compile, reporter)
    timesteps, means, of_real = scores_along(drawer, options, scorer, real, reporter, seed=args.seed)
    for prompt, first, last, beside in zip(LINES, means[0], means[-1], of_real, strict=True):
        reporter.line(f"{prompt}: {first:.3f} at t = {timesteps[0]}, {last:.3f} at t = 0, real digits {beside:.3f}")
    save_figure(show_scores(args.clip, timesteps, means, of_real), args.out, grey=False)
    scores = {prompt: {"drawn": means[:, i].tolist(), "real": of_real[i].item()} for i, prompt in enumerate(LINES)}
    content = {
        **drawer.facts,
        "options": asdict(options),
        "seed": args.seed,
        "num_images": args.num_images,
        "split": args.split,
        "clip": {"model": scorer.name, "weights_sha256": scorer.sha256},
        "t": timesteps,
        "scores": scores,
    }
    write_json(args.out.with_suffix(".json"), content)


def _synthetic(args: argparse.Namespace, reporter: Reporter) -> None:
    references, drawn = load_references(args.split, args.data_dir), read_samples(args.folder)
    learned = {}
    for name, digits in (("drawn", drawn), ("real", references.learned)):
        training = {"epochs": args.epochs, "seed": args.seed, "title": f"training a classifier on {name} digits"}
        share = accuracy_learned_from(digits, references.held_out, reporter, **training)
        learned[name] = {"num_images": len(digits.labels), "accuracy": share}
        reporter.line(
            f"learned from {len(digits.labels)} {name} digits: {share:.2%} of the {args.split} split recognised"
        )
    if args.out:
        facts = {"split": args.split, "epochs": args.epochs, "seed": args.seed}
        write_json(args.out, {**facts, **learned, "drawn_with": read_facts(args.folder)})


def _of(trained: Trained) -> dict[str, Any]:
    return {"sha256": trained.sha256, "test_accuracy": trained.accuracy}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="digits|fog|clip|synthetic")
    parser.set_defaults(packages=())
    digits = commands.add_parser("digits", help="evaluate drawn digits; writes a table, JSON and figures")
    _add_digits(digits)
    fog = commands.add_parser("fog", help="recognition of real digits at each noise level")
    fog.add_argument(
        "--checkpoint", type=Path, default=SHIPPED, help="checkpoint whose schedule is used; default: the shipped one"
    )
    fog.add_argument("--judge", type=Path, help="weights of the fog judge; default: the shipped ones")
    fog.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    fog.set_defaults(run=_fog, packages=("matplotlib",))
    clip_path = commands.add_parser("clip", help="CLIP scores at each step of the reverse process")
    _add_clip(clip_path)
    synthetic = commands.add_parser("synthetic", help="accuracy of a classifier trained on drawn digits only")
    synthetic.add_argument("folder", type=Path, help="a data set of scripts.make_dataset")
    synthetic.add_argument("--epochs", type=integer(1), default=EPOCHS, help=f"training epochs; default: {EPOCHS}")
    synthetic.add_argument("--seed", type=integer(0, 2**53 - 1), default=0, help="default: 0")
    synthetic.add_argument("--out", type=file_to_write(".json"), help="the .json file to write")
    synthetic.set_defaults(run=_synthetic)
    for command in (fog, synthetic):
        command.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")
    for command in (digits, fog, clip_path, synthetic):
        splits = SPLITS if command is digits else HELD_OUT_SPLITS  # the others need digits that were not learned from
        command.add_argument(
            "--split", choices=splits, default="test", help="real digits to compare with; default: test"
        )
        command.add_argument(
            "--data-dir", type=Path, default=Path("data"), help="folder of MNIST's IDX files; downloaded if missing"
        )
    return parser.parse_args(argv)


def _add_digits(digits: argparse.ArgumentParser) -> None:
    digits.add_argument(
        "--images", type=Path, help="evaluate this folder of PNGs or of scripts.make_dataset instead of drawing"
    )
    digits.add_argument("--out", type=Path, help="folder for evaluation.json, evaluation.md and the figures")
    digits.add_argument("--judge", type=Path, help="weights of the judge; default: the shipped ones")
    digits.add_argument("--extractor", type=Path, help="weights of the feature extractor; default: the shipped ones")
    digits.add_argument(
        "--clip", nargs="?", const="embedded", metavar="MODEL", help=f"also compute CLIP scores, with {CLIP_HELP}"
    )
    lowest = NUM_CLASSES * FEWEST_OF_EACH
    digits.add_argument(
        "--num-images",
        type=num_images(lowest, MOST_IMAGES),
        help=f"a multiple of 10, at least {lowest}; fewer than {FEWEST_IMAGES:,} give no Fréchet distance; "
        f"default: {NUM_IMAGES}, or as many as --images holds",
    )
    add_drawing_arguments(digits, seed=0)
    digits.set_defaults(run=_digits, packages=("torchmetrics", "matplotlib"))


def _add_clip(clip_path: argparse.ArgumentParser) -> None:
    clip_path.add_argument("--num-images", type=num_images(NUM_CLASSES, 4_000), default=200, help="default: 200")
    clip_path.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    clip_path.add_argument("--clip", default="embedded", metavar="MODEL", help=f"the CLIP model: {CLIP_HELP}")
    add_drawing_arguments(clip_path, seed=0, without=("--batch-size",))
    clip_path.set_defaults(run=_clip, packages=("matplotlib",))


if __name__ == "__main__":
    main()
