"""Distils a checkpoint into one that draws in few steps: `python -m scripts.distil --out runs/fast`.

Needs no images: the teacher draws what the student learns from. Started again it goes on.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, Checkpoint
from model.compiled.memory import keep_freed_memory
from scripts.common.arguments import Parser
from scripts.common.drawing import Drawer
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.progress import Reporter
from scripts.train import add_training_arguments, choose_device, should_compile, train
from scripts.training.distillation import DistillationObjective, draw_paths
from scripts.training.recipe import TEACHER_SAMPLER, Recipe, load_recipe, preset_names
from scripts.training.run import Run
from scripts.training.trainer import Trainer

NO_TIME = 1e-9  # minutes: no epoch fits


@reports_errors("distil")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, draws the paths, trains the student, and leaves all in the run's folder."""
    args = _parse(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    recipe = load_recipe(args.preset)
    if args.epochs:
        recipe = recipe.model_copy(update={"epochs": args.epochs})
    teacher = checkpoint.load(args.teacher)
    _check(recipe, teacher)
    device = choose_device(args.device)
    compiled = should_compile(args.compile, device)
    args.out.mkdir(parents=True, exist_ok=True)
    with Reporter("distil: stopped; start again to go on") as reporter:
        distil(args, recipe, teacher, device, compiled, reporter)


def distil(
    args: argparse.Namespace,
    recipe: Recipe,
    teacher: Checkpoint,
    device: torch.device,
    compiled: bool,
    reporter: Reporter,
) -> None:
    """Draws the missing paths and trains the student on them."""
    assert recipe.distillation
    end = time.perf_counter() + (60 * args.time_limit if args.time_limit else math.inf)
    start = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    drawer = Drawer(teacher, device)
    drawer.compile("on" if compiled else "off", reporter)
    paths = draw_paths(
        drawer,
        recipe.distillation,
        args.out / "paths",
        reporter,
        seed=args.seed,
        has_time=lambda: time.perf_counter() < end,
    )
    if not paths:
        reporter.line("the time limit is there, not all paths: start again to go on")
        return
    objective = DistillationObjective(recipe, *paths, device)
    trainer = Trainer(recipe, objective, seed=args.seed, device=device, compiled=compiled, start=start)
    guidance = recipe.distillation.guidance
    data = (
        f"{objective.num_examples} paths of the weights {teacher.weights_sha256}, "
        f"guided by {guidance.scale:g} at t = {guidance.start} to {guidance.stop}"
    )
    run = Run(args.out, Path(args.preset).stem, recipe, args.seed, data)
    minutes_left = (end - time.perf_counter()) / 60
    train(trainer, run, reporter, time_limit=max(minutes_left, NO_TIME) if args.time_limit else None)


def _check(recipe: Recipe, teacher: Checkpoint) -> None:
    """ScriptError where the recipe does not say how to distil, or says it for another network."""
    if not recipe.distillation:
        raise ScriptError("the recipe has no [distillation]")
    own, its = (recipe.unet, recipe.schedule, recipe.prediction), teacher.config
    for mine, theirs in zip(own, (its.unet, its.schedule, its.prediction), strict=True):
        if mine != theirs:
            raise ScriptError(f"the student begins as its teacher, which is of another kind: {theirs}")
    if its.steps or TEACHER_SAMPLER not in its.samplers:
        raise ScriptError(
            f"the teacher draws in {TEACHER_SAMPLER}'s steps, any number of them, which this one does not permit"
        )
    if recipe.distillation.guidance.scale != 1 and not its.guidable:
        raise ScriptError("this teacher cannot be guided: no label was dropped in its training")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.distil", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--preset", default="fast", help=f"{', '.join(preset_names(of_students=True))}, or a path to a .toml file"
    )
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help="a checkpoint; default: what ships")
    add_training_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
