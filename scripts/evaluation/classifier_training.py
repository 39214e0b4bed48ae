"""Trains a classifier on labelled images. Test images are used only once, after the training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from model.diffusion import Diffusion, running_average
from model.files import check_writable
from model.pixels import to_pixels
from model.precision import fast_dtype
from model.schedule import Schedule, ScheduleConfig
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.errors import ScriptError
from scripts.common.mnist import DATA_OF_FEATURES, TRAINING_DATA, load_mnist, mnist_data, split_unlearned
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import KINDS, Classifier, Shape, accuracy, save_classifier

MAX_ROTATION = math.radians(12)
MAX_SCALING = 0.1
MAX_SHIFT = 2 / 14  # in units of half of the image width: two pixels of 28
BATCH_SIZE = 256
SHIFT_PART = 16  # images in colour are shifted by at most this part of their width
MAX_EMA_DECAY = 0.998  # averages over about two epochs

# The extractor is trained on unchanged images, since its features must also measure slant, size and position. It leaves
# out the images with which distances between real images are measured (see `leave_out`).
RECIPES = {
    "judge": {"augmented": True, "epochs": 30, "seed": 0},
    "extractor": {"augmented": False, "epochs": 20, "seed": 1, "without_unlearned": True},
    "fog_judge": {"augmented": True, "fogged": True, "epochs": 20, "seed": 2},
}
# For data other than MNIST: epochs are chosen so that training uses about IMAGES_TO_SEE images, and the batch size so
# that an epoch has about NUM_BATCHES batches.
IMAGES_TO_SEE, FEWEST_EPOCHS, MOST_EPOCHS = 150_000, 10, 60
NUM_BATCHES, SMALLEST_BATCH = 50, 16
FEWEST_IMAGES = 2  # batch norm needs two


def all_of_mnist(kind: str, data_dir: Path) -> DataSet:
    """Returns MNIST for a kind of classifier, with its test split. Raises the errors of `load_mnist`."""
    data = replace(mnist_data(data_dir), test=ImageSet(*load_mnist("test", data_dir)))
    if not RECIPES[kind].get("without_unlearned"):
        return data
    learn, _ = split_unlearned(data.learn.images, data.learn.labels)
    return replace(data, learn=ImageSet(*learn), known_as=DATA_OF_FEATURES)


def own_data_for(kind: str, data: DataSet) -> DataSet:
    """Returns your own data without the training images that this kind of classifier must not learn."""
    return replace(data, learn=data.split_unlearned()[0]) if RECIPES[kind].get("without_unlearned") else data


def recipe_for(kind: str, data: DataSet, **overrides: int | bool | None) -> dict[str, Any]:
    """Returns the recipe of RECIPES, with epochs and batch size chosen for the data unless it is MNIST."""
    recipe = dict(RECIPES[kind])
    if data.known_as not in (TRAINING_DATA, DATA_OF_FEATURES):
        num_images = len(data.learn)
        batch = BATCH_SIZE
        while batch > SMALLEST_BATCH and batch * NUM_BATCHES > num_images:
            batch //= 2
        epochs = min(max(round(IMAGES_TO_SEE / num_images), FEWEST_EPOCHS), MOST_EPOCHS)
        recipe |= {"epochs": epochs, "batch_size": batch}
    return recipe | {name: value for name, value in overrides.items() if value is not None}


def train_and_save(kind: str, path: Path, data: DataSet, reporter: Reporter, recipe: dict[str, Any]) -> None:
    """Trains a classifier on the data with the recipe, and saves it with its accuracy on the test images.

    Raises OSError before the training if the file cannot be written.
    """
    check_writable(path.parent)
    torch.manual_seed(recipe["seed"])  # for the initial weights and for dropout
    network = train_classifier(
        KINDS[kind](Shape(data.image_shape, len(data.class_names), recipe.get("width", Shape().width))),
        data.learn,
        reporter,
        augmented=bool(recipe["augmented"]),
        flip=bool(recipe.get("flip", False)),
        fogged=bool(recipe.get("fogged", False)),
        epochs=int(recipe["epochs"]),
        batch_size=recipe.get("batch_size"),
        seed=recipe["seed"],
        title=f"training the {kind.replace('_', ' ')}",
    )
    facts = facts_of(network, data, **recipe)
    save_classifier(path, kind, network, facts)
    reporter.line(f"Recognised {facts['validation_accuracy']:.2%} of the validation images. Saved as {path}")


def train_classifier(  # noqa: PLR0913 # hyperparameters, each optional
    network: Classifier,
    learn: ImageSet,
    reporter: Reporter,
    *,
    augmented: bool,
    flip: bool = False,
    fogged: bool = False,
    epochs: int,
    batch_size: int | None = None,
    max_lr: float = 4e-3,
    seed: int = 0,
    title: str = "training a classifier",
) -> Classifier:
    """Trains the network on these images and returns it with the running average of its weights.

    `augmented` rotates, scales and shifts each image a little, and an image in colour is only shifted. The network then
    recognises more images, but its features measure fewer details. `flip` mirrors each image with probability 0.5.
    `fogged` adds the noise of a random timestep of the cosine schedule to each image.
    """
    generator = torch.Generator().manual_seed(seed)
    move = augment if learn.images.shape[1] == 1 else shift
    diffusion = Diffusion(Schedule(ScheduleConfig(kind="cosine")), generator)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    if len(learn) < FEWEST_IMAGES:
        raise ScriptError(f"a classifier needs at least {FEWEST_IMAGES} training images, but there are {len(learn)}")
    batch_size = min(batch_size or BATCH_SIZE, len(learn))
    network.prepare(learn.images)
    network.flip = flip

    # A CPU without instructions for bfloat16 would be ten times slower with it than in float32.
    is_fast = fast_dtype(torch.device("cpu")) == torch.bfloat16

    def loss_of(rows: Tensor) -> Tensor:
        images, labels = learn.images[rows], learn.labels[rows]
        x = move(images, generator) if augmented else images / 255
        if flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
        x = _fog(x, diffusion) if fogged else x
        with torch.autocast("cpu", torch.bfloat16, enabled=is_fast):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels, label_smoothing=network.label_smoothing)

    batches = Batches(len(learn), batch_size, epochs, generator)
    # The scales of batch norm and the biases do not decay, because nothing else sets the size of the outputs.
    vectors, matrices = ([p for p in network.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (False, True))
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": network.weight_decay}], max_lr
    )
    fit(network.train(), loss_of, batches, optimizer, reporter, title=title, warm_up=0.2, average_buffers=True)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Batches:
    """The row numbers of each batch of a training. The last incomplete batch of an epoch is dropped."""

    num_examples: int
    batch_size: int
    epochs: int
    generator: torch.Generator

    def __len__(self) -> int:
        """Returns the number of batches in all epochs."""
        return self.epochs * (self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields row numbers (B,), shuffled in each epoch."""
        for _ in range(self.epochs):
            order = torch.randperm(self.num_examples, generator=self.generator)
            yield from order[: len(self) // self.epochs * self.batch_size].split(self.batch_size)


def fit(  # hyperparameters
    network: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    reporter: Reporter,
    *,
    title: str,
    warm_up: float,
    average_buffers: bool = False,
) -> None:
    """Minimises `loss_of(rows)` over all batches, then sets the network to the running average of its weights.

    The learning rate rises to that of the optimizer in the first fraction `warm_up` of the steps, then falls to zero.
    """
    averaged = AveragedModel(network, multi_avg_fn=running_average(MAX_EMA_DECAY), use_buffers=average_buffers)
    max_lr = optimizer.param_groups[0]["lr"]
    # OneCycleLR divides by zero if the rise is exactly one step.
    rise = warm_up if warm_up * len(batches) > 1 else 0.0
    lr_schedule = OneCycleLR(optimizer, max_lr, total_steps=len(batches), pct_start=rise)
    with reporter.task(title, len(batches) * batches.batch_size, "images") as task:
        for rows in batches:
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
            averaged.update_parameters(network)
            task.advance(len(rows), f"loss {loss.item():.4f}")
    network.load_state_dict(averaged.module.state_dict())


def facts_of(network: Classifier, data: DataSet, **training: Any) -> dict[str, Any]:
    """Returns the metadata of the weights: accuracy on images not used for training, and the training options."""
    return {
        "test_accuracy": accuracy(network, data.test.images, data.test.labels),
        "num_test": len(data.test),
        "validation_accuracy": accuracy(network, data.validate.images, data.validate.labels),
        "data": data.description,
        "class_names": data.class_names,
        **training,
    }


def _fog(x: Tensor, diffusion: Diffusion) -> Tensor:
    """Returns x_t of x (B, C, H, W) at a random t in 1..T. Both are in [0, 1]. x_t is rounded to 8 bits."""
    x_t, _ = diffusion.add_noise(2 * x - 1, diffusion.draw_timesteps(len(x)))
    return to_pixels(x_t) / 255


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, scales and shifts images at random: uint8 (B, C, H, W) -> float32 (B, C, H, W) in [0, 1].

    Pixels at the border are repeated outwards.
    """
    draws = 2 * torch.rand(4, len(images), generator=generator) - 1  # (4, B) in [-1, 1]
    angle, scaling, shift_x, shift_y = draws.unbind()  # (B,) each
    angle, zoom = MAX_ROTATION * angle, 1 + MAX_SCALING * scaling
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    top = torch.stack([cos, -sin, MAX_SHIFT * shift_x], dim=1)  # (B, 3)
    bottom = torch.stack([sin, cos, MAX_SHIFT * shift_y], dim=1)  # (B, 3)
    positions = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images / 255, positions, padding_mode="border", align_corners=False)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts images by whole pixels, at random: uint8 (B, C, H, W) -> float32 (B, C, H, W) in [0, 1].

    Small photographs would lose details if they were rotated or scaled. Pixels at the border are repeated outwards.
    """
    num_images, channels, height, width = images.shape
    furthest = width // SHIFT_PART
    padded = F.pad(images / 255, (furthest,) * 4, mode="replicate")  # (B, C, H + 2 * furthest, W + 2 * furthest)
    down, right = torch.randint(2 * furthest + 1, (2, num_images, 1), generator=generator)  # (B, 1) each
    rows, columns = down + torch.arange(height), right + torch.arange(width)  # (B, H), (B, W)
    image = torch.arange(num_images)[:, None, None, None]
    return padded[image, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
