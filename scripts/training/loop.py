"""Runs the training loop. Resumes from the last saved state in the run folder."""

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.compiled.memory import keep_freed_memory
from model.files import write_atomically
from model.precision import can_compile, no_compiler
from scripts.common.data.data_set import DataSet, digest_in
from scripts.common.data.first_look import save_sheet
from scripts.common.errors import ScriptError
from scripts.common.plots import plot_losses
from scripts.common.progress import Reporter, is_installed
from scripts.training.auto import AUTO, choices_for, describe
from scripts.training.card import CARD, CURVES, card
from scripts.training.objective import DenoisingObjective
from scripts.training.processes import ALONE, Processes
from scripts.training.recipe import Recipe, is_for_distillation, load_recipe
from scripts.training.run import MODEL, STATE, Run, exclusive
from scripts.training.tensorboard import TENSORBOARD, tensorboard_writer
from scripts.training.trainer import EpochResult, Trainer

SAVE_SECONDS = 120.0  # within an epoch, the state is saved after this time
SHEET = "data.png"


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Values of the options of `arguments.add_training_arguments`."""

    preset: str  # the name of a preset, or a path to a .toml file
    out: Path  # run folder
    epochs: int | None = None  # None means the number in the preset
    time_limit: float | None = None  # minutes
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    compile: str = "auto"  # auto, on or off
    num_threads: int | None = None  # None means torch's default, or with several processes all cores divided among them
    start_from: Path | None = None  # checkpoint with the first weights; None means random weights
    flip: bool = False  # mirror each training image with probability 0.5
    tensorboard: bool = False  # write losses and images for TensorBoard

    def load_recipe(self, data: DataSet | None = None, teacher: CheckpointConfig | None = None) -> Recipe:
        """Returns the recipe of the preset for the data or the teacher, with the requested changes. Raises ScriptError.

        See `recipe.load_recipe`.
        """
        recipe = load_recipe(self.preset, data, self.epochs, teacher)
        return recipe.model_copy(update={"flip": True}) if self.flip else recipe

    def prepare(self, processes: Processes = ALONE) -> tuple[torch.device, bool]:
        """Sets torch's threads and allocator. Returns the device, and True if the training step will be compiled.

        Raises ScriptError if the device or a required compiler is not available.
        """
        if num_threads := self.num_threads or processes.default_threads:
            torch.set_num_threads(num_threads)
        keep_freed_memory()
        device = choose_device(self.device, processes)
        return device, should_compile(self.compile, device)

    def run_of(self, recipe: Recipe, data: str, class_names: tuple[str, ...]) -> Run:
        """Returns the run of the folder `out`. `data` describes the training data."""
        return Run(self.out, Path(self.preset).stem, recipe, self.seed, data, class_names)


def train_on(
    request: TrainingRequest, load: Callable[[], DataSet], reporter: Reporter, processes: Processes = ALONE
) -> None:
    """Trains the network of the preset on the data that `load` returns. Raises ScriptError if it cannot start.

    All processes call it with the same request.
    """
    if is_for_distillation(request.preset):
        raise ScriptError(f"the preset {request.preset} is for distillation. Use it with scripts.distil")
    start = checkpoint.load(request.start_from) if request.start_from else None
    check_folder(request)
    device, compiled = request.prepare(processes)
    with processes.connected(device):
        data = load()  # after everything that can be checked without it, because it can take minutes
        if request.preset == AUTO:
            reporter.line(f"chosen for this data: {', '.join(describe(choices_for(data, request.epochs)))}")
        recipe = request.load_recipe(data)
        _check_batch(recipe, data, processes)
        weights = first_weights(start, recipe, str(request.start_from)) if start else None
        objective = DenoisingObjective(recipe, data.learn, data.validate, device)
        trainer = Trainer(
            recipe,
            objective,
            seed=request.seed,
            device=device,
            compiled=compiled,
            start=weights,
            processes=processes,
        )
        run = request.run_of(recipe, data.description, data.class_names)
        if start:
            run.start = start
            for line in notes_about_start(start, data):
                reporter.line(line)
        processes.check_equal((run.identity, torch.__version__), "recipe, seed, data, starting checkpoint or PyTorch")
        with exclusive(run.folder) if processes.is_first else nullcontext():
            if processes.is_first and not (data.known_as or (run.folder / STATE).exists()):
                save_sheet(data, run.folder / SHEET)
                reporter.line(f"wrote some training images of each class to {run.folder / SHEET}")
            if request.tensorboard:
                run.watch = tensorboard_writer(run.folder / TENSORBOARD)
            train(trainer, run, reporter, time_limit=request.time_limit)
            _write_card(trainer, run, data)


def _check_batch(recipe: Recipe, data: DataSet, processes: Processes) -> None:
    if recipe.batch_size > len(data.learn):
        raise ScriptError(
            f"batch_size is {recipe.batch_size}, but there are only {len(data.learn)} training images. "
            "Use --preset auto"
        )
    if recipe.batch_size < processes.count:
        raise ScriptError(
            f"batch_size is {recipe.batch_size}, so at most {recipe.batch_size} processes can train. There are "
            f"{processes.count}. Use fewer, or a recipe with a larger batch_size"
        )


def _write_card(trainer: Trainer, run: Run, data: DataSet) -> None:
    """Writes the card and the curves of a finished run, unless the folder has a card. The first process does this."""
    is_finished = trainer.epoch == run.recipe.epochs
    if trainer.processes.is_first and is_finished and not (run.folder / CARD).exists():
        num_parameters = sum(p.numel() for p in trainer.network.parameters())
        if is_installed("matplotlib"):
            plot_losses([run.folder], run.folder / CURVES)
        write_atomically(run.folder / CARD, card(run, data, num_parameters).encode(errors="backslashreplace"))


def check_folder(request: TrainingRequest) -> None:
    """Raises ScriptError if the training would replace the checkpoint of a finished run, or the one it starts from.

    Also raises it if the service could not load the checkpoint, because a comma in its settings separates models.
    """
    if "," in str(request.out):
        raise ScriptError(f"--out {request.out}: the path must not have a comma, because the service cannot load it")
    if request.start_from and request.start_from.resolve().parent == request.out.resolve():
        raise ScriptError(f"--start-from is in {request.out}, where the training replaces it. Use another --out folder")
    if all((request.out / name).exists() for name in (MODEL, CARD)) and not (request.out / STATE).exists():
        raise ScriptError(f"{request.out} has a finished run without its state. Use another --out folder")


def notes_about_start(start: Checkpoint, data: DataSet) -> Iterator[str]:
    """Yields notes for the user if the checkpoint from which a training starts has learned something else."""
    learned = start.config.training.get("data")
    if isinstance(learned, str) and digest_in(learned) != digest_in(data.description):
        yield (
            f"note: the checkpoint of --start-from learned from other pictures ({learned}). If validation images are "
            "among them, the validation losses are too low"
        )
    if start.config.class_names != data.class_names:
        old, new = (", ".join(names) for names in (start.config.class_names, data.class_names))
        yield f"note: the classes of --start-from have other names: {old} before, {new} now"


def first_weights(loaded: Checkpoint, recipe: Recipe, name: str) -> dict[str, Tensor]:
    """Returns a copy of the weights of a checkpoint. `name` describes the checkpoint in an error.

    Raises ScriptError if its network, noise schedule or prediction is not that of the recipe.
    """
    different = []
    for part in ("unet", "schedule", "prediction"):
        mine, its = asdict(getattr(recipe, part)), asdict(getattr(loaded.config, part))
        different += [f"{part}.{key} is {mine[key]} here, {its[key]} there" for key in mine if mine[key] != its[key]]
    if different:
        raise ScriptError(
            f"the recipe and {name} differ: {'; '.join(different)}. With --data, the number of classes, the size and "
            "the colours are those of the data"
        )
    return {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}


def train(trainer: Trainer, run: Run, reporter: Reporter, *, time_limit: float | None = None) -> None:
    """Runs the remaining epochs. No process of another training may use the folder of the run (see `exclusive`).

    After `time_limit` minutes it saves the state and stops, but not before the end of the first epoch.
    """
    start = time.perf_counter()
    end = start + 60 * time_limit if time_limit else math.inf
    if run.resume(trainer):
        of_next = f", images of the next epoch: {trainer.images_done:,}" if trainer.images_done else ""
        reporter.line(f"resuming {run.folder}; epochs done: {trainer.epoch}{of_next}")
        if run.earlier_arithmetic != trainer.arithmetic:
            reporter.line(
                "the result will not be identical to an uninterrupted run, because the environment has changed: "
                f"{run.earlier_arithmetic} before, {trainer.arithmetic} now"
            )
    num_parameters = sum(p.numel() for p in trainer.network.parameters())
    reporter.line(f"{num_parameters:,} parameters, {trainer.objective.num_examples:,} examples, on {trainer.device}")
    if trainer.compiled:
        reporter.line("compiling the training step during the first batch; this takes a minute or more")
    while trainer.epoch < run.recipe.epochs:
        epoch_start = time.perf_counter()
        try:
            result = _epoch(trainer, run, reporter, end)
        except _TimeIsUp:
            reporter.line(f"time limit: stopped in epoch {trainer.epoch + 1}; run the same command again to resume")
            return
        if not math.isfinite(result.train_loss):
            raise ScriptError(
                f"the training loss of epoch {result.epoch} is {result.train_loss}. Use a lower learning rate, "
                "optimizer.lr, and another --out folder"
            )
        best = run.record(trainer, result)
        seconds = time.perf_counter() - epoch_start
        minutes_left = seconds * (run.recipe.epochs - trainer.epoch) / 60
        reporter.line(
            f"epoch {result.epoch}/{run.recipe.epochs}  train {result.train_loss:.5f}  "
            f"validation {result.validation_loss:.5f}{'  best' if best else ''}  "
            f"lr {result.learning_rate:.1e}  {seconds:.0f} s, {minutes_left:.0f} min left"
        )
    if trainer.processes.is_first and not (run.folder / MODEL).exists():
        raise ScriptError("no epoch had a validation loss that is a number. Use a lower learning rate, optimizer.lr")
    reporter.line(f"finished: {run.folder / MODEL}")
    reporter.line(f"serve it: scripts/serve --model {shlex.quote(f'{run.name}={run.folder / MODEL}')}")


class _TimeIsUp(Exception):
    """Raised after the time limit, when the state within the epoch was saved."""


def _epoch(trainer: Trainer, run: Run, reporter: Reporter, end: float) -> EpochResult:
    batch_size = run.recipe.batch_size
    total, done = trainer.steps_per_epoch * batch_size, trainer.images_done
    saved_at = time.monotonic()

    def on_steps(count: int, loss: float) -> None:
        nonlocal saved_at
        task.advance(count * batch_size, f"loss {loss:.4f}")
        # With a time limit, the clock of the first process decides, so that all processes stop after the same step.
        is_late = end < math.inf and bool(run.results) and trainer.processes.from_first(time.perf_counter() > end)
        if is_late or time.monotonic() - saved_at > SAVE_SECONDS:
            run.save_state(trainer)
            saved_at = time.monotonic()
        if is_late:
            raise _TimeIsUp

    with reporter.task(f"epoch {trainer.epoch + 1}/{run.recipe.epochs}", total, "images", done) as task:
        return trainer.run_epoch(on_steps)


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Returns the device that --device names. Each of several processes on a host has a GPU of its own.

    Raises ScriptError if this machine does not have it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise ScriptError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ScriptError(f"--device {name}: no CUDA device found")
        if device.type == "cuda" and processes.count > 1:
            device = _own_gpu(name, processes)
        torch.empty(0, device=device)  # fails for cuda:N above the last device
    except RuntimeError as error:
        raise ScriptError(str(error)) from error
    return device


def _own_gpu(name: str, processes: Processes) -> torch.device:
    if ":" in name:
        raise ScriptError(f"--device {name}: with torchrun, each process has a GPU of its own. Use --device cuda")
    if processes.local_count > (num_gpus := torch.cuda.device_count()):
        raise ScriptError(
            f"torchrun has started {processes.local_count} processes on a host with {num_gpus} GPUs. Use "
            f"--nproc-per-node {num_gpus}, or --device cpu"
        )
    return torch.device("cuda", processes.local_rank)


def should_compile(wanted: str, device: torch.device) -> bool:
    """Returns True if the training step will be compiled.

    `auto` compiles on a CPU if a compiler is found, and not on a GPU, where the step runs as a CUDA graph. `on` raises
    ScriptError if no compiler is found. Compiling for a GPU needs no C++ compiler.
    """
    if device.type == "cuda":
        return wanted == "on"
    if wanted == "on" and not can_compile():
        raise ScriptError(f"--compile on {no_compiler()}")
    return wanted != "off" and can_compile()
