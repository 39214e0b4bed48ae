"""Distillation: trains a student network that needs one step, or a few, instead of the many of its teacher.

The teacher first generates images with a deterministic sampler, so that each noise has an image. The student starts
with the teacher's weights. It learns to predict the finished image in a single step: from pure noise at t = T, and from
the x_t at each later timestep of its paths. The training takes a single step from T to that timestep, with the
student's own prediction. A path of more than two steps gets there in several steps, with better predictions.

A mean squared error alone would teach it the mean of all plausible images, which is blurred. So an adversary compares
its images with real ones (adversary.py), and a classifier says whether they can be read. The images of the teacher keep
it from forgetting shapes. The student needs no guidance, so it evaluates its network once for each step.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.nn import functional as F

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.files import write_atomically
from model.noise import normal
from model.paths import timesteps_of
from model.pixels import from_pixels, to_pixels
from model.prediction import Prediction, unclipped_x_0
from model.sampler import Denoiser, plan_through
from model.schedule import Schedule
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.errors import ScriptError
from scripts.common.mnist import TRAINING_DATA
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import load_classifier
from scripts.training.adversary import Adversary
from scripts.training.loop import TrainingRequest, train
from scripts.training.objective import HeldOut, Losses, LossOf, half_mirrored
from scripts.training.processes import processes_of_environment
from scripts.training.recipe import STUDENT_SAMPLER, TEACHER_SAMPLER, DistillationRecipe, Recipe
from scripts.training.run import TEACHER, exclusive
from scripts.training.trainer import Trainer, uses_bfloat16

PART_SIZE = 2_560  # images per file
NO_TIME = 1e-9  # minutes; a positive time limit in which no epoch can finish
# Added to the seed of the run. Evaluations use smaller seeds, so the noise of an image is never used in an evaluation.
IMAGE_SEED = 2**52
# Predictions are clipped to [-1, 1], as in the sampler. Within this distance they still have a gradient. A pixel that
# is clipped would otherwise never change again.
BEYOND = 0.5
FINEST = 400  # a timestep of a path of this number of steps counts once in the list of timesteps
READABLE = 0.1  # nats; an image whose class is this certain is readable enough, and has no gradient from the classifier
Classify = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [-1, 1] -> logits (B, K)


class TeacherImages:
    """Images of the teacher, (N, C, H, W) uint8, each with its label and with the noise of its seed and index."""

    def __init__(self, images: Tensor, y: Tensor, index: Tensor, seed: int) -> None:
        self.images, self.y, self.index, self.seed = images, y, index, seed

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, rows: Tensor | slice) -> "TeacherImages":
        """Returns some of the images."""
        return TeacherImages(self.images[rows], self.y[rows], self.index[rows], self.seed)

    def to(self, device: torch.device) -> "TeacherImages":
        """Returns the images on the device."""
        return TeacherImages(self.images.to(device), self.y.to(device), self.index.to(device), self.seed)

    def noise(self, rows: Tensor) -> Tensor:
        """Returns x_T of the images `rows` (B,), (B, C, H, W) float32."""
        index = self.index[rows]
        shape: tuple[int, int, int] = tuple(self.images.shape[1:])  # type: ignore[assignment] # has three values
        return normal(torch.full_like(index, self.seed), index, torch.zeros_like(index), shape)


def draw_images(
    drawer: Drawer,
    recipe: DistillationRecipe,
    folder: Path,
    reporter: Reporter,
    *,
    seed: int,
    has_time: Callable[[], bool] = lambda: True,
) -> TeacherImages | None:
    """Returns the images of the teacher, `num_images + num_held_out`, equally many of each class in turn.

    Loads the images that the folder already has and generates the others. Returns None if `has_time` becomes false
    before all images exist. Raises ScriptError if the folder has images of another teacher, recipe, seed, device or
    dtype.
    """
    count = recipe.num_images + recipe.num_held_out
    parts = []
    for start in range(0, count, PART_SIZE):
        file = folder / f"{start:07}.safetensors"
        if not file.exists() and not has_time():
            return None
        parts.append(_load_or_draw_part(drawer, recipe, file, range(start, start + PART_SIZE), reporter, seed=seed))
    index = torch.arange(count)
    return TeacherImages(torch.cat(parts)[:count], index % len(drawer.class_names), index, IMAGE_SEED + seed)


def _load_or_draw_part(
    drawer: Drawer, recipe: DistillationRecipe, file: Path, index: range, reporter: Reporter, *, seed: int
) -> Tensor:
    facts = {
        "teacher_weights_sha256": drawer.checkpoint.weights_sha256,
        "guidance": str(recipe.guidance),
        "timesteps": str(timesteps_of(drawer.checkpoint.schedule, TEACHER_SAMPLER, recipe.teacher_steps)),
        "images": f"{index.start} to {index.stop}",
        "seed": str(seed),
        "arithmetic": f"{drawer.device.type}, {drawer.dtype}{', compiled' if drawer.compiled else ''}",
    }
    if not file.exists():
        options = DrawingOptions(TEACHER_SAMPLER, recipe.teacher_steps, recipe.guidance)
        rows = torch.tensor(index)
        drawn = drawer.draw(rows % len(drawer.class_names), rows, options, reporter, seed=IMAGE_SEED + seed)
        write_atomically(file, serialize({"images": to_pixels(drawn)}, facts))
    try:
        with safe_open(file, framework="pt") as opened:
            if opened.metadata() != facts:
                raise ScriptError(
                    f"{file} has images of another teacher, recipe, seed, device or dtype. Use another --out folder"
                )
            return opened.get_tensor("images")
    except SafetensorError as error:
        raise ScriptError(f"{file} is damaged. Remove it and run the same command again") from error


class DistillationObjective:
    """The loss of a student at the timesteps of its paths.

    It is the sum of three losses: that of the adversary, the squared error from the image of the teacher, and the cross
    entropy of a classifier. `real` has the real images for the adversary. `classify` is the classifier, None for none.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: TeacherImages,
        real: ImageSet,
        device: torch.device,
        *,
        classify: Classify | None = None,
        compiled: bool = False,
    ) -> None:
        assert recipe.distillation and recipe.adversary
        self.recipe, self._weights, self._of_adversary = recipe, recipe.distillation, recipe.adversary
        self.schedule = Schedule(recipe.schedule)
        self.prediction = Prediction(recipe.prediction, self.schedule)
        self._mix = self.prediction.table(device)  # (T + 1, 3)
        steps = [_step_from_noise(self.schedule, t) for t in range(self.schedule.num_steps + 1)]
        self._step_from_noise = torch.tensor(steps, device=device)  # (T + 1, 2)
        later, self._first_share = _timesteps_of_paths(self.schedule, recipe.distillation.num_steps)
        self._later, self._visited = later.to(device), sorted({*later.tolist(), self.schedule.num_steps})
        held_out = recipe.distillation.num_held_out
        self._images = images.rows(slice(-held_out)).to(device)
        self._real = _ByClass(real, recipe.unet.num_classes, device)
        self._classify, self._device, self._compiled = classify, device, compiled
        self._held_out = self._hold_out(images.rows(slice(-held_out, None)).to(device))
        self._adversary: Adversary | None = None  # `loss_of` makes it, with the random numbers of the run

    @property
    def num_examples(self) -> int:
        """Number of images of the teacher in the training set, without those that are held out."""
        return len(self._images)

    def loss_of(self, generator: torch.Generator) -> LossOf:
        """Returns the loss of the student. It also lets the adversary learn at each call.

        The adversary begins with random weights of torch's generator, as the network of a training does.
        """
        adversary = self._adversary = Adversary(
            self._of_adversary,
            self.recipe.unet,
            generator,
            bfloat16=uses_bfloat16(self.recipe, self._device),
            compiled=self._compiled,
            capturable=self._device.type == "cuda",
        )

        def loss(denoiser: Denoiser, rows: Tensor) -> Tensor:
            y = self._images.y[rows]  # (B,)
            x_t, t = self._inputs(denoiser, rows, generator)
            x_0 = self._predict(denoiser, x_t, t, y)  # (B, C, H, W)
            real = self._real.draw(y, generator)  # (B, C, H, W)
            if self.recipe.flip:  # as in the training of the teacher
                real = half_mirrored(real, generator)
            adversary.learn(real, x_0, t, y)
            of_image = (x_0 - from_pixels(self._images.images[rows])).square().mean()
            total = adversary.loss(real, x_0, t, y) + self._weights.image_weight * of_image
            if self._classify and self._weights.recognition_weight:
                surprise = F.cross_entropy(self._classify(x_0), y, reduction="none")  # (B,)
                total = total + self._weights.recognition_weight * (surprise - READABLE).relu().mean()
            return total

        return loss

    def validation_losses(self, denoiser: Denoiser) -> Losses:
        """Returns the mean squared error from the held-out images of the teacher, also for each timestep from low."""
        return self._held_out.losses(denoiser)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the adversary."""
        assert self._adversary
        return self._adversary.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        assert self._adversary
        self._adversary.load_state_dict(dict(state))

    def _inputs(self, denoiser: Denoiser, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns x_t (B, C, H, W) and t (B,). The first rows are noise at T, the others are at later timesteps."""
        T, noise = self.schedule.num_steps, self._images.noise(rows)
        num_first = len(rows)
        if len(self._later) and num_first > 1:
            num_first = min(max(round(self._first_share * len(rows)), 1), len(rows) - 1)
        y = self._images.y[rows[num_first:]]
        at_T = torch.full((len(rows),), T, device=rows.device)
        if not len(y):
            return noise, at_T
        chosen = torch.randint(len(self._later), y.shape, generator=generator, device=rows.device)
        later = self._later[chosen]  # (B - num_first,)
        with torch.no_grad():
            x_0 = self._predict(denoiser, noise[num_first:], at_T[num_first:], y)
        x_t = self._after_first_step(noise[num_first:], x_0, later)
        return torch.cat([noise[:num_first], x_t]), torch.cat([at_T[:num_first], later])

    def _after_first_step(self, noise: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Returns x_t (B, C, H, W) after a step from x_T, which is the noise, with the prediction x_0, to t (B,)."""
        a, b = self._step_from_noise[t][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        return a * noise + b * x_0

    def _predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the predicted x_0 in [-1, 1], (B, C, H, W). See BEYOND for its gradient."""
        x_0 = unclipped_x_0(x_t, denoiser(x_t, t, y).float(), self._mix[t]).clamp(-1 - BEYOND, 1 + BEYOND)
        return x_0 + (x_0.clamp(-1, 1) - x_0).detach()

    def _hold_out(self, images: TeacherImages) -> HeldOut:
        """Returns the rows of the validation: each image at each timestep of the paths, with the noise of its own."""
        everything = torch.arange(len(images), device=self._device)
        noise, x_0 = images.noise(everything), from_pixels(images.images)
        t = torch.tensor(self._visited, device=self._device).repeat_interleave(len(images))  # (N,)
        row = everything.repeat(len(self._visited))  # (N,)
        x_t = self._after_first_step(noise[row], x_0[row], t)  # (N, C, H, W)
        errors = partial(_errors, mix=self._mix[t], x_t=x_t, x_0=x_0, row=row)
        return HeldOut(x_t, t, images.y[row], errors, t)


class _ByClass:
    """Real images, from which a random one of a class can be drawn without waiting for the device."""

    def __init__(self, real: ImageSet, num_classes: int, device: torch.device) -> None:
        order = real.labels.argsort(stable=True)
        self._images = real.images[order].to(device)
        self._counts = real.labels.bincount(minlength=num_classes).to(device)  # (K,), each at least 1
        self._starts = self._counts.cumsum(0) - self._counts  # (K,)

    def draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a random image of each class in y (B,), (B, C, H, W) in [-1, 1]."""
        share = torch.rand(y.shape, generator=generator, device=y.device, dtype=torch.float64)
        place = (share * self._counts[y]).long()  # (B,), always below the count, because the share is below 1
        return from_pixels(self._images[self._starts[y] + place])


def _timesteps_of_paths(schedule: Schedule, num_steps: tuple[int, ...]) -> tuple[Tensor, float]:
    """Returns the later timesteps of the paths, and the share of steps from T, if each number of steps is as frequent.

    A later timestep is in the list in proportion to how often the paths visit it, at least once.
    """
    paths = [schedule.even_timesteps(number) for number in num_steps]
    first = sum(1 / number for number in num_steps) / len(num_steps)
    frequency = Counter[int]()
    for number, path in zip(num_steps, paths, strict=True):
        for t in path[1:-1]:
            frequency[t] += max(round(FINEST / number), 1)
    divisor = math.gcd(*frequency.values()) or 1
    later = [t for t in sorted(frequency, reverse=True) for _ in range(frequency[t] // divisor)]
    return torch.tensor(later, dtype=torch.int64), first


def _step_from_noise(schedule: Schedule, t: int) -> tuple[float, float]:
    """Returns a and b of the step x_t = a x_T + b x_0 from T to t. For t = T it stays at x_T."""
    T = schedule.num_steps
    if t == T:
        return 1.0, 0.0
    a, b, _, _ = plan_through(schedule, STUDENT_SAMPLER, (T, t)).coefficients[0].tolist()
    return a, b


def _errors(output: Tensor, *, mix: Tensor, x_t: Tensor, x_0: Tensor, row: Tensor) -> Tensor:
    """Returns the squared error of each output from x_0[row], (N,)."""
    predicted = unclipped_x_0(x_t, output, mix).clamp(-1, 1)
    return (predicted - x_0[row]).square().mean(dim=(1, 2, 3))


def distil(request: TrainingRequest, teacher: Path, load: Callable[[], DataSet], reporter: Reporter) -> None:
    """Generates the missing images of the teacher, which is a checkpoint file, and trains the student.

    `load` loads the real images. It is called after everything else is checked. The student has the network, the
    schedule and the prediction of its teacher. Stops at the time limit. Raises CheckpointError if the teacher cannot be
    loaded. Raises ScriptError if the recipe does not match the teacher, the data or the folder.
    """
    if processes_of_environment().count > 1:
        raise ScriptError("distillation runs in a single process. Start it without torchrun, or unset WORLD_SIZE")
    loaded = checkpoint.load(teacher)
    recipe = request.load_recipe(teacher=loaded.config)
    distillation = _check(recipe, loaded.config)
    start = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    device, compiled = request.prepare()
    data = load()
    _check_data(data, loaded)
    with exclusive(request.out):
        end = time.perf_counter() + (60 * request.time_limit if request.time_limit else math.inf)
        drawer = Drawer(loaded, device)
        drawer.compile("on" if compiled else "off", reporter)
        images = draw_images(
            drawer,
            distillation,
            request.out / TEACHER,
            reporter,
            seed=request.seed,
            has_time=lambda: time.perf_counter() < end,
        )
        if not images:
            reporter.line("time limit reached before all images were generated; run the same command again to resume")
            return
        classify = _reader_of_digits(device) if data.known_as == TRAINING_DATA else None
        if classify:
            images = _only_readable(images, classify, device, reporter)
        if len(images) < recipe.batch_size + distillation.num_held_out:
            raise ScriptError(
                f"only {len(images)} images of the teacher can be read, too few for a batch and the validation. Use a "
                "teacher that was trained for longer, or more num_images"
            )
        objective = DistillationObjective(recipe, images, data.learn, device, classify=classify, compiled=compiled)
        trainer = Trainer(recipe, objective, seed=request.seed, device=device, compiled=compiled, start=start)
        guidance = distillation.guidance
        learned = (
            f"{objective.num_examples} images of the weights {loaded.weights_sha256}, "
            f"guided by {guidance.scale:g} at t = {guidance.start} to {guidance.stop}, and {data.description}"
        )
        minutes_left = (end - time.perf_counter()) / 60
        time_limit = max(minutes_left, NO_TIME) if request.time_limit else None
        run = request.run_of(recipe, learned, loaded.config.class_names)
        run.start = loaded
        train(trainer, run, reporter, time_limit=time_limit)


def _reader_of_digits(device: torch.device) -> Classify:
    """Returns the fog judge. It has not learned the digits of an evaluation, and does not judge them."""
    network = load_classifier("fog_judge").network.to(device)
    return lambda x_0: network((x_0 + 1) / 2)


def _only_readable(
    images: TeacherImages, classify: Classify, device: torch.device, reporter: Reporter
) -> TeacherImages:
    """Leaves out the images that the classifier does not recognise, so that the student does not learn them."""
    with torch.inference_mode():
        logits = [classify(from_pixels(part.to(device))) for part in images.images.split(PART_SIZE)]
        readable = torch.cat(logits).argmax(dim=1).cpu() == images.y
    readable = readable.clone()  # a tensor of inference mode cannot be used in a training
    reporter.line(f"{(~readable).sum()} of {len(images)} images of the teacher cannot be read and are left out")
    return images.rows(readable)


def _check(recipe: Recipe, teacher: CheckpointConfig) -> DistillationRecipe:
    """Returns the recipe's table [distillation]. Raises ScriptError if it is missing or does not fit the teacher."""
    if not recipe.distillation:
        raise ScriptError("the recipe has no [distillation] table. Use --preset fast, or train with scripts.train")
    if teacher.steps or TEACHER_SAMPLER not in teacher.samplers:
        raise ScriptError(
            f"the teacher must permit the sampler {TEACHER_SAMPLER} with any number of steps. It permits "
            f"{', '.join(teacher.samplers)} with {' or '.join(map(str, teacher.steps)) or 'any number of'} steps"
        )
    if recipe.distillation.guidance.scale != 1 and not teacher.guidable:
        raise ScriptError(
            "the teacher was trained without label dropout and does not support guidance. "
            "Set distillation.guidance.scale to 1, or use another teacher"
        )
    return recipe.distillation


def _check_data(data: DataSet, teacher: Checkpoint) -> None:
    """Raises ScriptError if the data cannot be that of the teacher's training."""
    names = teacher.config.class_names
    if (teacher.image_shape, names) != (data.image_shape, data.class_names):
        raise ScriptError(
            f"the teacher generates {len(names)} classes of {_shape(teacher.image_shape)} images, but the data has "
            f"{len(data.class_names)} classes of {_shape(data.image_shape)} images, or other names. Use the data of "
            "the teacher's training"
        )
    if missing := sorted(set(range(len(names))) - set(data.learn.labels.tolist())):
        raise ScriptError(f"the data has no training images of the class {names[missing[0]]}. Add some")


def _shape(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
