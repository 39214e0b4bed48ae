"""Trains a network on MNIST by a preset: `python -m scripts.train --preset default --out runs/default`.

Started again with the same arguments it goes on from the last whole epoch, bit by bit as if never stopped.
"""

import argparse
import time
from pathlib import Path

import torch

from model.compiled.memory import keep_freed_memory
from model.precision import can_compile, no_compiler
from scripts.common.arguments import Parser, integer, positive
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_VALIDATION, load_mnist
from scripts.common.progress import Reporter
from scripts.training.objective import DenoisingObjective
from scripts.training.recipe import load_recipe, preset_names
from scripts.training.run import Run
from scripts.training.trainer import EpochResult, Trainer


@reports_errors("train")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, trains, and leaves the run in its folder."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    recipe = load_recipe(args.preset)
    if recipe.distillation:
        raise ScriptError(f"{args.preset} trains a student: that is what scripts.distil does")
    if args.epochs:
        recipe = recipe.model_copy(update={"epochs": args.epochs})
    device = choose_device(args.device)
    compiled = should_compile(args.compile, device)
    images, labels = load_mnist("train", args.data_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    objective = DenoisingObjective(recipe, images, labels, device)
    trainer = Trainer(recipe, objective, seed=args.seed, device=device, compiled=compiled)
    data = f"MNIST, training split less the last {NUM_VALIDATION} images"
    run = Run(args.out, Path(args.preset).stem, recipe, args.seed, data)
    with Reporter("train: stopped; start again to go on after the last whole epoch") as reporter:
        train(trainer, run, reporter, time_limit=args.time_limit)


def train(trainer: Trainer, run: Run, reporter: Reporter, *, time_limit: float | None = None) -> None:
    """Runs the epochs that are left; stops before an epoch that would not fit into `time_limit` minutes."""
    start = time.perf_counter()
    if run.resume(trainer):
        reporter.line(f"going on after epoch {trainer.epoch} of {run.folder}")
        if run.earlier_arithmetic != trainer.arithmetic:
            reporter.line(f"not bit by bit: before it was {run.earlier_arithmetic}, now {trainer.arithmetic}")
    num_parameters = sum(p.numel() for p in trainer.network.parameters())
    reporter.line(f"{num_parameters:,} parameters, {trainer.objective.num_examples:,} examples, on {trainer.device}")
    if trainer.compiled:
        reporter.line("the first step compiles, which takes a minute or more")
    longest_epoch = 0.0
    while trainer.epoch < run.recipe.epochs:
        epoch_start = time.perf_counter()
        if time_limit and (epoch_start - start + longest_epoch) > 60 * time_limit:
            reporter.line(f"the time limit is near: stopped after epoch {trainer.epoch}; start again to go on")
            return
        result = _epoch(trainer, run, reporter)
        seconds = time.perf_counter() - epoch_start
        longest_epoch = max(longest_epoch, seconds)
        best = run.record(trainer, result)
        reporter.line(
            f"epoch {result.epoch}/{run.recipe.epochs}  train {result.train_loss:.5f}  "
            f"validation {result.validation_loss:.5f}{'  best' if best else ''}  "
            f"lr {result.learning_rate:.1e}  {seconds:.0f} s"
        )


def _epoch(trainer: Trainer, run: Run, reporter: Reporter) -> EpochResult:
    batch_size = run.recipe.batch_size
    total = trainer.steps_per_epoch * batch_size
    with reporter.task(f"epoch {trainer.epoch + 1}/{run.recipe.epochs}", total, "images") as task:
        return trainer.run_epoch(lambda step, loss: task.advance(batch_size, f"loss {loss:.4f}"))


def choose_device(name: str) -> torch.device:
    """Returns the device of --device. Raises ScriptError if this machine has no such device."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise ScriptError(f"--device {name}: auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ScriptError(f"--device {name}: no CUDA device is there")
        torch.empty(0, device=device)  # fails for cuda:N above the last device
    except RuntimeError as error:
        raise ScriptError(str(error)) from error
    return device


def should_compile(wanted: str, device: torch.device) -> bool:
    """Returns whether to compile: `auto` compiles if a compiler is found, `on` raises ScriptError if none is."""
    possible = device.type == "cuda" or can_compile()
    if wanted == "on" and not possible:
        raise ScriptError(f"--compile on {no_compiler()}")
    return possible and wanted != "off"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="default", help=f"{', '.join(preset_names(of_students=False))}, or a path to a .toml file"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="IDX files; downloaded there if missing")
    add_training_arguments(parser)
    return parser.parse_args(argv)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What every training takes."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it goes on")
    parser.add_argument("--epochs", type=integer(1), help="instead of the preset's")
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="MINUTES",
        help="stop before an epoch that, as long as those before, would not fit; the first is always made",
    )
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, help="same seed, same machine: same weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto", help="auto: where a compiler is found"
    )
    parser.add_argument("--num-threads", type=integer(1, 1024), help="compute threads on a CPU")


if __name__ == "__main__":
    main()
