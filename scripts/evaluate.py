"""Evaluates generated digits: `python -m scripts.evaluate digits --out evaluation/`.

digits      recognition accuracy, Fréchet distance, precision, recall, coverage, share of memorised digits
pictures    the same for a model of your own pictures, with classifiers trained on these pictures
fog         recognition of real digits at each noise level
recognize   recognition of real digits by the diffusion model, and rejection of other images
handwriting recognition of a fixed set of handwriting that is not from MNIST, and rejection of letters
clip        CLIP scores at each step of the reverse process
clip-guidance   recognition, distance and CLIP similarity for scales and intervals of CLIP guidance
clip-attributes stroke width and slant of digits for prompts such as "a thick seven"
clip-prompts    similarity of suitable and unrelated prompts, and how many of them get a warning
synthetic   accuracy of a classifier that was trained only on generated digits
denoise     removal of noise from real digits, and probabilities of the digit in a noisy image
inpaint     recognition of real digits after a part was erased and filled in, and the fit at the border
edit        recognition of redrawn sketches, and their distance from the sketches

Choose settings with --split validation, but guidance with `digits --split training`. Publish figures of --split test.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import read_config
from model.inpainting import INPAINTING_SCALE, NUM_LEVELS, NUM_RESAMPLINGS
from model.recognition import DEFAULT_NUM_PAIRS, MAX_NUM_PAIRS
from model.spec import SHIPPED
from scripts.common.arguments import (
    CLIP_GUIDANCE,
    CLIP_MODEL_HELP,
    OWN_DATA_HELP,
    Parser,
    add_drawing_arguments,
    file_to_write,
    from_arguments,
    given_options,
    integer,
    interval,
    num_images,
    scale_of_clip_guidance,
)
from scripts.common.drawing import DrawingRequest, check_options
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require_installed
from scripts.evaluation.clip_attributes import SCALE as ATTRIBUTES_SCALE
from scripts.evaluation.clip_attributes import SEED as ATTRIBUTES_SEED
from scripts.evaluation.clip_attributes import evaluate_clip_attributes
from scripts.evaluation.clip_guidance import INTERVALS, SCALE, SCALES, ClipSweepRequest, evaluate_clip_guidance
from scripts.evaluation.clip_path import evaluate_clip
from scripts.evaluation.clip_prompts import evaluate_clip_prompts
from scripts.evaluation.comparison import check_intervals
from scripts.evaluation.denoising import evaluate_denoising
from scripts.evaluation.editing import evaluate_editing
from scripts.evaluation.fog import evaluate_fog
from scripts.evaluation.handwriting import PARTS
from scripts.evaluation.handwriting_accuracy import evaluate_handwriting
from scripts.evaluation.inpainting import evaluate_inpainting
from scripts.evaluation.own_data import evaluate_pictures
from scripts.evaluation.quality import evaluate_digits
from scripts.evaluation.recognize import RecognitionRequest, evaluate_recognition
from scripts.evaluation.samples import (
    FEWEST_OF_EACH,
    HELD_OUT_SPLITS,
    MOST_IMAGES,
    MOST_PICTURES,
    NUM_IMAGES,
    SPLITS,
    most_images,
    samples_of_checkpoint,
    samples_of_folder,
)
from scripts.evaluation.spaces import DIGITS_NEED, PHOTOGRAPHS_NEED
from scripts.evaluation.synthetic import EPOCHS, evaluate_synthetic
from scripts.evaluation.tables import FEWEST_IMAGES

PACKAGES = {
    "digits": ("torchmetrics", "matplotlib", *DIGITS_NEED),
    "pictures": ("torchmetrics", "matplotlib", *PHOTOGRAPHS_NEED),
    "fog": ("matplotlib",),
    "recognize": ("matplotlib",),
    "handwriting": ("matplotlib",),
    "clip": ("matplotlib",),
    "clip-guidance": ("torchmetrics", "matplotlib"),
    "clip-attributes": ("matplotlib",),
    "clip-prompts": (),
    "synthetic": (),
    "denoise": ("matplotlib",),
    "inpaint": ("matplotlib",),
    "edit": ("matplotlib",),
}
# Drawing options that have no effect on the evaluation of pictures.
NOT_OF_PICTURES = (
    "--sampler",
    "--num-steps",
    "--guidance-scale",
    "--guidance-start",
    "--guidance-stop",
    *CLIP_GUIDANCE,
    "--seed",
    "--batch-size",
)
PICTURE_HELP = "plot to write, a .png file; the data is written to a .json file with the same name"
RECOGNIZE_HELP = (
    "plot to write, a .png file; the results are written to a .json file with the same name, and the errors to a "
    ".errors.safetensors file, from which a stopped run continues"
)


@reports_errors("evaluate")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and runs the subcommand."""
    args = build_parser().parse_args(argv)
    if args.command == "digits":
        _limit_images(args)
    _check_options(args)
    require_installed(*PACKAGES[args.command], extra="evaluate")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    data: dict[str, Any] = {"split": getattr(args, "split", None), "data_dir": getattr(args, "data_dir", None)}
    with Reporter() as reporter:
        match args.command:
            case "digits":
                if args.images:
                    samples = samples_of_folder(args.images, args.num_images, reporter)
                else:
                    samples = samples_of_checkpoint(from_arguments(DrawingRequest, args), args.num_images, reporter)
                networks = {"judge": args.judge, "extractor": args.extractor, "clip_model": args.clip}
                evaluate_digits(samples, reporter, **networks, **data, out=args.out)
            case "pictures":
                request = from_arguments(DrawingRequest, args)
                chosen = {name: getattr(args, name) for name in ("data", "num_images", "judge", "extractor", "flip")}
                evaluate_pictures(request, reporter, **chosen, out=args.out)
            case "fog":
                evaluate_fog(args.checkpoint, args.judge, args.out, reporter, **data)
            case "clip" | "clip-guidance" | "clip-attributes" | "clip-prompts":
                _evaluate_clip(args, reporter, data)
            case "synthetic":
                evaluate_synthetic(args.folder, args.out, reporter, epochs=args.epochs, seed=args.seed, **data)
            case _:
                _evaluate_task(args, reporter, data)


def _limit_images(args: argparse.Namespace) -> None:
    """Sets the default number of images for the split `training`. Raises ScriptError if there are too many for a split.

    A folder with images has a default of its own.
    """
    most = most_images(args.split)
    if (args.num_images or 0) > most:
        raise ScriptError(f"--num-images must be at most {most} with --split {args.split}")
    if most < NUM_IMAGES and not args.images:
        args.num_images = args.num_images or most


def _check_options(args: argparse.Namespace) -> None:
    """Raises CheckpointError or ScriptError for options that have no effect or that the checkpoint does not permit."""
    match args.command:
        case "synthetic":
            return
        case "fog":
            read_config(args.checkpoint)
            return
        case "digits" if args.images:
            if given := given_options(args, kept=["num_threads"]):
                raise ScriptError(f"{given[0]} has no effect on existing images. Remove it, or remove --images")
            return
        case "clip-guidance" | "clip-attributes" if not args.clip_guidance_scale:
            raise ScriptError("--clip-guidance-scale must be above 0, because this command measures CLIP guidance")
        case "clip-guidance":
            check_intervals(read_config(args.checkpoint), args.intervals)
    check_options(from_arguments(DrawingRequest, args))


def _evaluate_clip(args: argparse.Namespace, reporter: Reporter, data: dict[str, Any]) -> None:
    """Evaluates CLIP scores, CLIP guidance or prompts."""
    request = from_arguments(DrawingRequest, args)
    match args.command:
        case "clip":
            evaluate_clip(request, args.clip, args.out, reporter, num_images=args.num_images, **data)
        case "clip-guidance":
            evaluate_clip_guidance(request, from_arguments(ClipSweepRequest, args), reporter)
        case "clip-attributes":
            evaluate_clip_attributes(request, args.out, reporter, num_images=args.num_images)
        case "clip-prompts":
            evaluate_clip_prompts(request, args.clip, args.out, reporter, num_images=args.num_images, **data)


def _evaluate_task(args: argparse.Namespace, reporter: Reporter, data: dict[str, Any]) -> None:
    """Evaluates a task that starts from an image."""
    match args.command:
        case "recognize":
            drawing = from_arguments(DrawingRequest, args)
            evaluate_recognition(from_arguments(RecognitionRequest, args), drawing, reporter)
        case "handwriting":
            given = {"num_pairs": args.num_pairs, "split": args.split}
            evaluate_handwriting(from_arguments(DrawingRequest, args), args.out, reporter, **given)
        case "denoise":
            drawing = from_arguments(DrawingRequest, args)
            evaluate_denoising(drawing, args.out, reporter, num_images=args.num_images, **data)
        case "inpaint":
            request, counts = from_arguments(DrawingRequest, args), (args.num_images, args.num_resamplings)
            evaluate_inpainting(request, args.judge, args.out, reporter, counts=counts, **data)
        case "edit":
            request = from_arguments(DrawingRequest, args)
            evaluate_editing(request, args.judge, args.out, reporter, num_images=args.num_images, **data)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="|".join(PACKAGES), dest="command")
    digits = commands.add_parser("digits", help="evaluate generated digits; write a table, JSON and plots")
    _add_digits(digits)
    _add_pictures(commands.add_parser("pictures", help="evaluate a model of your own pictures with the same metrics"))
    fog = commands.add_parser("fog", help="recognition of real digits at each noise level")
    fog.add_argument(
        "--checkpoint",
        type=Path,
        default=SHIPPED,
        help="checkpoint with the noise schedule to use; default: the shipped one",
    )
    fog.add_argument("--judge", type=Path, help="weights of the fog judge; default: the shipped ones")
    fog.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    recognize = commands.add_parser("recognize", help="recognition of real digits by the diffusion model")
    _add_recognize(recognize)
    handwriting = commands.add_parser("handwriting", help="recognition of handwriting that is not from MNIST")
    _add_recognition(handwriting)
    handwriting.add_argument(
        "--split",
        choices=PARTS,
        default="test",
        help="part of the set; default: test. The two parts have different fonts",
    )
    handwriting.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    clip_path = commands.add_parser("clip", help="CLIP scores at each step of the reverse process")
    clip_prompts = commands.add_parser("clip-prompts", help="similarity of suitable and unrelated prompts")
    for command, ending in ((clip_path, ".png"), (clip_prompts, ".json")):
        _add_clip(command, ending)
    clip_guidance = commands.add_parser("clip-guidance", help="scales and intervals of CLIP guidance")
    _add_clip_guidance(clip_guidance)
    _add_clip_attributes(commands.add_parser("clip-attributes", help="stroke width and slant for prompts"))
    synthetic = commands.add_parser("synthetic", help="accuracy of a classifier trained only on generated digits")
    synthetic.add_argument("folder", type=Path, help="data set written by scripts.make_dataset")
    synthetic.add_argument("--epochs", type=integer(1), default=EPOCHS, help=f"training epochs; default: {EPOCHS}")
    synthetic.add_argument("--seed", type=integer(0, 2**53 - 1), default=0, help="seed of the training; default: 0")
    synthetic.add_argument("--out", type=file_to_write(".json"), help=".json file for the results; default: print only")
    denoise = commands.add_parser("denoise", help="removal of noise from real digits")
    add_drawing_arguments(denoise, seed=0, without=NOT_OF_PICTURES)
    denoise.add_argument("--num-images", type=integer(10, 5_000), default=1_000, help="number of digits; default: 1000")
    denoise.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    inpaint = commands.add_parser("inpaint", help="filling in real digits of which a part is erased")
    _add_redrawing(inpaint, num_images_by_default=1000)
    inpaint.set_defaults(num_steps=NUM_LEVELS, guidance_scale=INPAINTING_SCALE)
    inpaint.add_argument(
        "--num-resamplings",
        type=integer(1, 100),
        default=NUM_RESAMPLINGS,
        help=f"number of times that each step after the first is taken (RePaint); default: {NUM_RESAMPLINGS}",
    )
    edit = commands.add_parser("edit", help="redrawing sketches at several strengths")
    _add_redrawing(edit, num_images_by_default=100)
    for command in (fog, synthetic):
        command.add_argument(
            "--num-threads", type=integer(1, 1024), help="compute threads on a CPU; default: PyTorch's choice"
        )
    for command in (digits, fog, recognize, denoise, inpaint, edit, clip_path, clip_prompts, synthetic):
        splits = (
            SPLITS if command is digits else HELD_OUT_SPLITS
        )  # the others need digits that were not used for training
        command.add_argument(
            "--split",
            choices=splits,
            default="test",
            help="split of MNIST with the real digits to compare with; default: test",
        )
    for command in (digits, fog, recognize, denoise, inpaint, edit, clip_path, clip_prompts, clip_guidance, synthetic):
        command.add_argument(
            "--data-dir",
            type=Path,
            default=Path("data"),
            help="folder with MNIST's IDX files, downloaded if missing; default: data",
        )
    return parser


def _add_digits(digits: argparse.ArgumentParser) -> None:
    digits.add_argument(
        "--images",
        type=Path,
        help="evaluate the images in this folder instead of generating images: PNGs, or a data set of "
        "scripts.make_dataset",
    )
    digits.add_argument(
        "--out", type=Path, help="folder for evaluation.json, evaluation.md and the plots; default: print only"
    )
    digits.add_argument("--judge", type=Path, help="weights of the judge; default: the shipped ones")
    digits.add_argument("--extractor", type=Path, help="weights of the feature extractor; default: the shipped ones")
    digits.add_argument(
        "--clip",
        nargs="?",
        const="embedded",
        metavar="MODEL",
        help=f"also compute CLIP scores with this model: {CLIP_MODEL_HELP}",
    )
    lowest = NUM_CLASSES * FEWEST_OF_EACH
    digits.add_argument(
        "--num-images",
        type=num_images(lowest, MOST_IMAGES),
        help=f"number of images, a multiple of 10 from {lowest} to {MOST_IMAGES}, or to {most_images('training')} with "
        f"--split training; the Fréchet distance needs at least {FEWEST_IMAGES:,}; default: the largest number, or all "
        "in --images up to it",
    )
    add_drawing_arguments(digits, seed=0)


def _add_pictures(pictures: argparse.ArgumentParser) -> None:
    pictures.add_argument(
        "--data", type=Path, metavar="PATH", required=True, help=f"the data of the training: {OWN_DATA_HELP}"
    )
    pictures.add_argument(
        "--out", type=Path, help="folder for evaluation.json, evaluation.md and the plots; default: print only"
    )
    pictures.add_argument(
        "--num-images",
        type=integer(1, MOST_PICTURES),
        help="number of images, equally many of each class; default: as many of each class as the smallest one has "
        f"training images, at most {NUM_IMAGES} together",
    )
    for kind in ("judge", "extractor"):
        pictures.add_argument(
            f"--{kind}",
            type=Path,
            help=f"weights of the {kind}, from scripts.train_classifiers; default: train it on --data and cache it",
        )
    pictures.add_argument(
        "--flip",
        action="store_true",
        help="mirror images at random while the classifiers train; use it if the model was trained with it",
    )
    add_drawing_arguments(pictures, seed=0)


def _add_recognition(parser: argparse.ArgumentParser) -> None:
    add_drawing_arguments(parser, seed=0, without=NOT_OF_PICTURES)
    parser.add_argument(
        "--num-pairs",
        type=integer(1, MAX_NUM_PAIRS),
        default=DEFAULT_NUM_PAIRS,
        help=f"pairs of a timestep and a noise for each class; default: {DEFAULT_NUM_PAIRS}",
    )


def _add_recognize(recognize: argparse.ArgumentParser) -> None:
    _add_recognition(recognize)
    recognize.add_argument(
        "--num-images", type=integer(1), help="number of digits, the first ones of the shuffled split; default: all"
    )
    recognize.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop improbable classes after each pair; --no-prune evaluates all classes and reports the results with "
        "and without pruning; default: --prune",
    )
    recognize.add_argument(
        "--num-non-digits",
        type=integer(0, 1_000),
        default=100,
        help="number of images without a digit, for each kind of image; 0 skips this part; default: 100",
    )
    recognize.add_argument(
        "--fit",
        action="store_true",
        help="fit the constants of recognition to these digits, and write them to a .readout.json file",
    )
    recognize.add_argument("--out", type=file_to_write(".png"), required=True, help=RECOGNIZE_HELP)


def _add_clip(parser: argparse.ArgumentParser, ending: str) -> None:
    parser.add_argument(
        "--num-images",
        type=num_images(NUM_CLASSES, 4_000),
        default=200,
        help="number of images, a multiple of 10; default: 200",
    )
    help_text = PICTURE_HELP if ending == ".png" else ".json file for the results; a table is written to a .md file"
    parser.add_argument("--out", type=file_to_write(ending), required=True, help=help_text)
    parser.add_argument(
        "--clip", default="embedded", metavar="MODEL", help=f"the CLIP model of the scores: {CLIP_MODEL_HELP}"
    )
    add_drawing_arguments(parser, seed=0, without=("--batch-size",))


def _add_clip_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scales",
        type=scale_of_clip_guidance,
        nargs="+",
        default=SCALES,
        help=f"scales of the sweep; default: {' '.join(map(str, SCALES))}",
    )
    parser.add_argument(
        "--intervals",
        type=interval,
        nargs="+",
        default=INTERVALS,
        metavar="A-B",
        help="intervals of timesteps of the sweep; default: "
        + " ".join(f"{start}-{stop}" for start, stop in INTERVALS),
    )
    count = num_images(NUM_CLASSES * FEWEST_OF_EACH, MOST_IMAGES)
    parser.add_argument(
        "--num-images", type=count, default=1_000, help="number of images per setting of the sweep; default: 1000"
    )
    parser.add_argument(
        "--num-test-images",
        type=count,
        default=2_000,
        help="number of images per setting on the test split; default: 2000",
    )
    parser.add_argument(
        "--out",
        type=file_to_write(".png"),
        required=True,
        help="plot to write, a .png file; the table is written to a .md file with the same name, and the results to a "
        ".validation.json and a .test.json file, from which a stopped run continues. The plot and the table show all "
        "results of these files, including those of earlier runs with other scales and intervals",
    )
    add_drawing_arguments(parser, seed=None, clip_guidance_scale=SCALE, without=("--seed", "--clip-prompt"))


def _add_clip_attributes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-images", type=integer(1, 1_000), default=50, help="images of each digit and prompt; default: 50"
    )
    parser.add_argument(
        "--out",
        type=file_to_write(".png"),
        required=True,
        help="picture to write, a .png file; the table and the data are written to a .md and a .json file with the "
        "same name",
    )
    add_drawing_arguments(
        parser, seed=ATTRIBUTES_SEED, clip_guidance_scale=ATTRIBUTES_SCALE, without=("--clip-prompt",)
    )


def _add_redrawing(parser: Parser, *, num_images_by_default: int) -> None:
    parser.add_argument(
        "--num-images",
        type=num_images(NUM_CLASSES, 4_000),
        default=num_images_by_default,
        help=f"number of images, a multiple of 10; default: {num_images_by_default}",
    )
    parser.add_argument("--judge", type=Path, help="weights of the judge; default: the shipped ones")
    parser.add_argument("--out", type=file_to_write(".png"), required=True, help=PICTURE_HELP)
    add_drawing_arguments(parser, seed=0, without=CLIP_GUIDANCE)


if __name__ == "__main__":
    main()
