"""Chooses a recipe for data: what differs from the preset `default`, which was made for MNIST."""

import json
from collections.abc import Iterator
from typing import Any

from scripts.common.data.data_set import DataSet
from scripts.common.data.source import MAX_CLASSES

AUTO = "auto"  # the name of the preset
BATCH, SMALLEST_BATCH = 64, 16
FEWEST_STEPS = 1500  # in the whole training: few images or epochs have smaller batches, if SMALLEST_BATCH permits it
IMAGES_TO_SEE = 600_000  # training images, counted in each epoch; MNIST's preset sees 1,650,000
FEWEST_EPOCHS, MOST_EPOCHS = 20, 150
WARM_UP_SHARE, WARM_UP_STEPS = 0.1, 500
TWO_LEVELS = 32  # larger images have a third level, so that attention sees few positions
THREE_LEVELS_UNIT = 8  # with a third level, the size must be a multiple of it
# Widths for data of at most this number of classes. The limit of a checkpoint's conditioning table (steps x classes x
# widths) requires narrower networks for more classes.
WIDTHS = {323: [64, 128], 431: [48, 96], 647: [32, 64], MAX_CLASSES: [16, 32]}
WIDTHS_OF_THREE_LEVELS = {234: [64, 96, 128], 313: [48, 72, 96], 470: [32, 48, 64], MAX_CLASSES: [16, 16, 32]}


def choices_for(data: DataSet, epochs: int | None = None) -> dict[str, Any]:
    """Returns the values of a recipe that follow from the data. `epochs` is given or chosen."""
    num_images, (_, size, _) = len(data.learn), data.image_shape
    epochs = epochs or min(max(round(IMAGES_TO_SEE / num_images), FEWEST_EPOCHS), MOST_EPOCHS)
    batch = BATCH
    while batch > SMALLEST_BATCH and batch * FEWEST_STEPS > num_images * epochs:
        batch //= 2
    batch = min(batch, num_images)
    num_steps = epochs * (num_images // batch)
    has_classes = len(data.class_names) > 1
    # Guidance moves an image away from the mean of all classes. With one class, there is nothing to move away from.
    guidance = {"scale": 1.7 if has_classes else 1.0, "start": 20, "stop": 90}
    has_third_level = size > TWO_LEVELS and size % THREE_LEVELS_UNIT == 0
    widths = WIDTHS_OF_THREE_LEVELS if has_third_level else WIDTHS
    return {
        "epochs": epochs,
        "batch_size": batch,
        "label_drop": 0.1 if has_classes else 0.0,
        "guidance": guidance,
        "guidance_by_sampler": {"ddpm": guidance},
        "lr_schedule": {"name": "cosine", "warmup_steps": min(WARM_UP_STEPS, round(WARM_UP_SHARE * num_steps))},
        "unet": {"widths": next(each for most, each in widths.items() if len(data.class_names) <= most)},
    }


def describe(choices: dict[str, Any]) -> Iterator[str]:
    """Yields each choice in the form of a recipe file, in which it can be changed."""
    for name, value in choices.items():
        if isinstance(value, dict):
            yield from (f"{name}.{each}" for each in describe(value))
        else:
            yield f"{name} = {json.dumps(value)}"
