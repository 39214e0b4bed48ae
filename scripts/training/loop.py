"""Runs a training from the last whole epoch in its folder to its end."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.compiled.memory import keep_freed_memory
from model.precision import can_compile, no_compiler
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_VALIDATION, load_mnist
from scripts.common.progress import Reporter
from scripts.training.objective import DenoisingObjective
from scripts.training.recipe import Recipe, load_recipe
from scripts.training.run import Run
from scripts.training.trainer import EpochResult, Trainer


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """The options of `arguments.add_training_arguments`."""

    preset: str
    out: Path  # folder of the run
    epochs: int | None = None  # None means the preset's
    time_limit: float | None = None  # minutes
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    compile: str = "auto"  # auto, on or off
    num_threads: int | None = None  # None leaves the number to torch

    def load_recipe(self) -> Recipe:
        """Returns the preset's recipe with the requested number of epochs. Raises ScriptError."""
        recipe = load_recipe(self.preset)
        return recipe.model_copy(update={"epochs": self.epochs}) if self.epochs else recipe

    def prepare(self) -> tuple[torch.device, bool]:
        """Sets up torch. Returns the device, and True if the step is to be compiled. May raise ScriptError."""
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        keep_freed_memory()
        device = choose_device(self.device)
        return device, should_compile(self.compile, device)

    def run_of(self, recipe: Recipe, data: str) -> Run:
        """Returns the run in the folder. `data` describes the training data."""
        return Run(self.out, Path(self.preset).stem, recipe, self.seed, data)


def train_on_mnist(request: TrainingRequest, data_dir: Path, reporter: Reporter) -> None:
    """Trains the preset's network on MNIST's training split; ScriptError if it cannot begin."""
    recipe = request.load_recipe()
    if recipe.distillation:
        raise ScriptError(f"{request.preset} trains a student: that is what scripts.distil does")
    device, compiled = request.prepare()
    images, labels = load_mnist("train", data_dir)
    request.out.mkdir(parents=True, exist_ok=True)
    objective = DenoisingObjective(recipe, images, labels, device)
    trainer = Trainer(recipe, objective, seed=request.seed, device=device, compiled=compiled)
    run = request.run_of(recipe, f"MNIST, training split less the last {NUM_VALIDATION} images")
    train(trainer, run, reporter, time_limit=request.time_limit)


def train(trainer: Trainer, run: Run, reporter: Reporter, *, time_limit: float | None = None) -> None:
    """Runs the remaining epochs. Stops before an epoch that would not fit into `time_limit` minutes."""
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
    """Returns True for compiling. `auto` compiles if a compiler is found. `on` raises ScriptError without one."""
    possible = device.type == "cuda" or can_compile()
    if wanted == "on" and not possible:
        raise ScriptError(f"--compile on {no_compiler()}")
    return possible and wanted != "off"
