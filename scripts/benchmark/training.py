"""Measures the training speed of scripts.train and of a plain training loop: `python -m scripts.bench training`."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from model.compiled.memory import keep_freed_memory
from model.files import write_json
from model.pixels import from_pixels
from model.schedule import Schedule
from model.unet import UNet
from scripts.benchmark.machine import matrix_rate, this_device, this_machine
from scripts.benchmark.report import with_spread
from scripts.benchmark.step_time import flop_of
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.mnist import mnist_data
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table
from scripts.training.objective import DenoisingObjective
from scripts.training.recipe import Recipe, load_recipe
from scripts.training.trainer import Trainer

CONTESTANTS = ("scripts.train", "scripts.train, not compiled", "a plain loop")
WARM_UP_STEPS = 5  # not measured, because the first steps compile
TRAINING_COLUMNS = ("training loop", "training images/s", "share of the limit")  # explained in page.EXPLANATIONS
PASSES = 3  # a backward pass costs as much as two forward passes


class _EnoughError(Exception):
    """Ends the training after the last measured step."""


def measure_training(preset: str, num_steps: int, repeats: int, data_dir: Path, out: Path, reporter: Reporter) -> None:
    """Measures the training loops in turns, writes the results and prints the table.

    The limit is the matrix rate divided by the arithmetic of training with one image.
    """
    recipe, device = load_recipe(preset), this_device()
    data = mnist_data(data_dir)
    keep_freed_memory()  # scripts.train does the same
    limit = matrix_rate(device) / (PASSES * flop_of(UNet(recipe.unet)))
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for repeat in range(repeats):
        for name, found in rates.items():
            found.append(images_a_second(name, recipe, data, device, num_steps))
            reporter.line(f"{repeat + 1}: {name}: {found[-1]:.1f} images/s")
    reporter.line(as_table(TRAINING_COLUMNS, training_table(rates, limit)))
    write_json(out, {"machine": this_machine().as_json(), "limit": limit, "images_a_second": rates})


def images_a_second(name: str, recipe: Recipe, data: DataSet, device: torch.device, num_steps: int) -> float:
    """Returns the speed of a training loop of CONTESTANTS over `num_steps` steps."""
    if name == "a plain loop":
        times = list(islice(plain_loop(recipe, data.learn, device), WARM_UP_STEPS + num_steps + 1))
    else:
        times = of_trainer(recipe, data, device, num_steps, compiled=name == "scripts.train")
    steps = [later - earlier for earlier, later in pairwise(times[WARM_UP_STEPS:])]
    return recipe.batch_size * len(steps) / sum(steps)


def training_table(rates: Mapping[str, Sequence[float]], limit: float) -> list[list[str]]:
    """Returns a line for each training loop. `rates` and `limit` are in images per second."""
    return [[name, with_spread(found), f"{statistics.median(found) / limit:.0%}"] for name, found in rates.items()]


def of_trainer(recipe: Recipe, data: DataSet, device: torch.device, num_steps: int, *, compiled: bool) -> list[float]:
    """Trains with scripts.train's trainer. Returns the time after each step, in seconds of `time.perf_counter`."""
    times: list[float] = []

    def record(count: int, loss: float) -> None:
        times.append(time.perf_counter())
        if len(times) > WARM_UP_STEPS + num_steps:
            raise _EnoughError

    objective = DenoisingObjective(recipe, data.learn, data.validate, device)
    trainer = Trainer(recipe, objective, seed=0, device=device, compiled=compiled)
    trainer.steps_per_report = 1  # `record` is then called after each step
    try:
        while True:
            trainer.run_epoch(record)
    except _EnoughError:
        return times


def plain_loop(recipe: Recipe, learn: ImageSet, device: torch.device) -> Iterator[float]:
    """Trains the same network to predict eps, with a DataLoader in float32. Yields the time after each step."""
    network, schedule = UNet(recipe.unet).to(device), Schedule(recipe.schedule)
    alpha_bar = schedule.alpha_bar.float().to(device)  # (T + 1,)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.optimizer.lr)
    examples = TensorDataset(from_pixels(learn.images), learn.labels)
    while True:
        for x_0, y in DataLoader(examples, recipe.batch_size, shuffle=True, drop_last=True):
            x_0, y = x_0.to(device), y.to(device)  # (B, C, H, W), (B,)
            t = torch.randint(1, schedule.num_steps + 1, (len(x_0),), device=device)  # (B,)
            eps = torch.randn_like(x_0)  # (B, C, H, W)
            alpha_bar_t = alpha_bar[t][:, None, None, None]  # (B, 1, 1, 1)
            x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps  # (B, C, H, W)
            loss = nn.functional.mse_loss(network(x_t, t, y), eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            yield time.perf_counter()
