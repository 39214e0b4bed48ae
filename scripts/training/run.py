"""The run folder of a training. It contains these files:

state.pt           the state that is needed to resume
model.safetensors  the checkpoint with the lowest validation loss, or of the last epoch of a distillation
losses.csv         one line per epoch
epochs/NN.png      an image of each class after each epoch, generated from the same noise
losses.png         the losses of a finished run
README.md          the card of a finished run
data.png           some training images of each class, of own data
tensorboard/       losses and images for TensorBoard, with --tensorboard
teacher/           of a distillation: the images that the teacher generated
"""

import csv
import fcntl
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.files import write_atomically
from model.sampler import sample
from model.spec import DIGITS
from scripts.common.data.data_set import digest_in
from scripts.common.errors import ScriptError
from scripts.common.pictures import GRID_COLUMNS, save_grid
from scripts.training.recipe import Recipe
from scripts.training.trainer import EpochResult, Trainer

GRID_SEED, GRID_ROWS = 2026, 4
NEWER_FIELDS = ("flip", "min_loss_weight", "overshoot_weight", "adversary")  # of a recipe
MODEL, STATE, TEACHER = "model.safetensors", "state.pt", "teacher"


def stop_message(script: str, folder: Path) -> str:
    """Returns the message of a script that was stopped. It says what the same command does next."""
    if (folder / STATE).exists():
        return f"{script}: stopped; run the same command again to resume from the last saved state"
    if any((folder / TEACHER).glob("*.safetensors")):
        return f"{script}: stopped; run the same command again to resume with the images that are complete"
    return f"{script}: stopped before a state was saved; the same command starts from the beginning"


def earlier_data(facts: Mapping[str, Any]) -> list[Any]:
    """Returns the descriptions of the data of earlier trainings, from the facts about a training in a checkpoint."""
    listed = facts.get("earlier_data")
    return listed if isinstance(listed, list) else []


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Creates a run folder and locks it, so that two processes do not replace each other's files.

    Raises ScriptError if another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ScriptError(f"another process trains in {folder}. Use another --out folder") from error
        yield
    finally:
        os.close(lock)  # also unlocks it, as the end of the process does


class Run:
    """One training run on disk.

    All files are written atomically. If the process is killed, the last state and the best checkpoint remain valid.
    """

    def __init__(
        self, folder: Path, preset: str, recipe: Recipe, seed: int, data: str, class_names: tuple[str, ...] = DIGITS
    ) -> None:
        self.folder, self.preset, self.recipe, self.seed, self.data = folder, preset, recipe, seed, data
        self.class_names = class_names
        self.start: checkpoint.Checkpoint | None = None  # the checkpoint with the first weights; None if random
        self.results: list[EpochResult] = []
        self.watch: Callable[[EpochResult, Tensor], None] = lambda result, images: None  # called after each epoch
        self.earlier_arithmetic: str | None = None  # Trainer.arithmetic before the run was resumed

    @property
    def name(self) -> str:
        """The name of the folder as the name of a model, which has at most 64 letters, digits and `._-`."""
        name = re.sub(r"[^0-9A-Za-z._-]", "-", self.folder.resolve().name)
        return name.lstrip("._-")[:64] or "model"

    @property
    def identity(self) -> dict[str, Any]:
        """Returns the values that must be equal when a run is resumed."""
        recipe = self.recipe.model_dump(mode="json")
        for name in NEWER_FIELDS:  # The runs of the previous release do not have them.
            if recipe[name] == Recipe.model_fields[name].default:
                del recipe[name]
        identity = {"recipe": recipe, "seed": self.seed, "data": digest_in(self.data)}
        identity |= {"start": self.start.weights_sha256} if self.start else {}
        return identity if self.class_names == DIGITS else identity | {"class_names": self.class_names}

    def resume(self, trainer: Trainer) -> bool:
        """Restores the trainer to the last saved state. Returns False if the folder has no state yet.

        Raises ScriptError if the state cannot be read, or if its identity or its release is another one.
        """
        path, processes = self.folder / STATE, trainer.processes
        # Only the host of the first process needs the folder.
        content = processes.from_first(self._read_state() if processes.is_first else None)
        if content is None:
            return False
        try:
            state = torch.load(io.BytesIO(content), map_location=trainer.device, weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise ScriptError(f"{path} cannot be read ({type(error).__name__}). Use another --out folder") from error
        if identity != self.identity:
            different = "another recipe, seed, data or starting checkpoint"
            raise ScriptError(f"{self.folder} has a run with {different}. Use another --out folder")
        try:
            trainer.load_state_dict(state["trainer"])
            self.results = [EpochResult(**result) for result in state["results"]]
            self.earlier_arithmetic = state["arithmetic"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ScriptError(f"{path} was written by another release of unfog. Use another --out folder") from error
        return True

    def _read_state(self) -> bytes | None:
        for name in (STATE, MODEL):
            for left_over in self.folder.glob(f".{name}.*"):  # by a process that was killed while it saved
                left_over.unlink(missing_ok=True)
        path = self.folder / STATE
        return path.read_bytes() if path.exists() else None

    def record(self, trainer: Trainer, result: EpochResult) -> bool:
        """Writes the files of an epoch. Returns True if its validation loss is the lowest so far.

        Of several processes, only the first writes them.

        The checkpoint is that of the lowest loss. With an adversary it is always the last one, because the squared
        error, which favours blurred images, does not show how much better the images get.
        """
        loss = result.validation_loss
        best = math.isfinite(loss) and not any(earlier.validation_loss <= loss for earlier in self.results)
        self.results.append(result)
        if not trainer.processes.is_first:
            return best
        if best or (self.recipe.adversary and math.isfinite(loss)):
            self.safe_save_model(trainer)
        columns = min(len(self.class_names), GRID_COLUMNS)
        images = self._samples(trainer)
        self.watch(result, images)
        save_grid(images, self.folder / "epochs" / f"{result.epoch:02d}.png", columns=columns)
        write_atomically(self.folder / "losses.csv", self._csv().encode())
        self.save_state(trainer)
        return best

    def save_state(self, trainer: Trainer) -> None:
        """Writes the state from which a resumed run continues, within an epoch or between two epochs.

        All processes have the same state, and the first one writes it.
        """
        if not trainer.processes.is_first:
            return
        state = {
            "identity": self.identity,
            "arithmetic": trainer.arithmetic,
            "trainer": trainer.state_dict(),
            "results": [asdict(result) for result in self.results],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / STATE, buffer.getvalue())

    def safe_save_model(self, trainer: Trainer) -> None:
        """Writes the checkpoint with the averaged weights and with the settings that the service needs."""
        checkpoint.save(self.folder / MODEL, trainer.averaged, self._config(trainer))

    def _config(self, trainer: Trainer) -> checkpoint.CheckpointConfig:
        last = self.results[-1]
        return self.recipe.checkpoint_config(
            self.class_names,
            {
                "preset": self.preset,
                "data": self.data,
                "epochs": trainer.epoch,
                "seed": self.seed,
                **self._facts_of_start(),
                "label_drop": self.recipe.label_drop,
                "final_losses": {"train": last.train_loss, "validation": last.validation_loss},
            },
        )

    def _facts_of_start(self) -> dict[str, Any]:
        """Returns the digest of the first weights, and the descriptions of all data from which they learned."""
        if not self.start:
            return {}
        facts = self.start.config.training
        return {"start": self.start.weights_sha256, "earlier_data": [*earlier_data(facts), facts.get("data")]}

    def _samples(self, trainer: Trainer) -> Tensor:
        """Returns an image of each class, of the first classes if there are many, in full rows."""
        config, num_classes = self._config(trainer), len(self.class_names)
        columns = min(num_classes, GRID_COLUMNS)
        num_images = min(-(-num_classes // columns), GRID_ROWS) * columns
        y = torch.arange(num_images, device=trainer.device) % num_classes
        sampler = config.samplers[0]
        return sample(
            trainer.denoise_averaged,
            trainer.objective.schedule,
            y,
            seed=torch.full_like(y, GRID_SEED),
            index=torch.arange(num_images, device=trainer.device),
            image_shape=(config.unet.image_channels, config.unet.image_size, config.unet.image_size),
            sampler=sampler,
            num_steps=config.spec.default_steps,
            guidance=config.guidance_of(sampler),
            prediction=trainer.objective.prediction,
            null_label=trainer.averaged.null_label,
        )

    def _csv(self) -> str:
        out = io.StringIO()
        bands = [f"validation_loss_band_{i + 1}" for i in range(len(self.results[0].band_losses))]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["epoch", "train_loss", "validation_loss", *bands, "learning_rate"])
        for r in self.results:
            losses = (r.train_loss, r.validation_loss, *r.band_losses)
            writer.writerow([r.epoch, *(f"{loss:.6f}" for loss in losses), f"{r.learning_rate:.3e}"])
        return out.getvalue()
