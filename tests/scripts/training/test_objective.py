from functools import partial

import pytest
import torch
from torch import Tensor

from scripts.common.data.data_set import ImageSet
from scripts.training.objective import VALIDATION_BATCH, DenoisingObjective, _validation_rows
from tests.scripts.tiny_training import NUM_IMAGES, NUM_STEPS, NUM_VALIDATION, noise_data, recipe_of


@pytest.fixture
def objective() -> DenoisingObjective:
    data = noise_data()
    return DenoisingObjective(recipe_of("cosine"), data.learn, data.validate, torch.device("cpu"))


def noise_of(objective: DenoisingObjective) -> Tensor:
    """Returns the noise of the validation rows, which is the target of the kind eps."""
    errors = objective._held_out.errors
    assert isinstance(errors, partial)
    noise: Tensor = errors.keywords["eps"]
    return noise


def test_loss_of_a_zero_output_is_the_noise_variance_in_every_band(objective: DenoisingObjective) -> None:
    validation_loss, band_losses = objective.validation_losses(lambda x_t, t, y: torch.zeros_like(x_t))
    n = NUM_VALIDATION * 784
    assert abs(validation_loss - 1) < 5 * (2 / n) ** 0.5
    assert all(abs(loss - 1) < 5 * (2 / (n / 8)) ** 0.5 for loss in band_losses)


def test_bands_are_quarters_of_the_timesteps_with_least_noise_first(objective: DenoisingObjective) -> None:
    held_out = objective._held_out
    targets = iter(noise_of(objective).split(VALIDATION_BATCH))
    _, band_losses = held_out.losses(lambda x_t, t, y: next(targets) + t[:, None, None, None])
    quarter = NUM_STEPS // 4
    for band, loss in enumerate(band_losses):
        steps = [t for t in held_out.t.tolist() if band * quarter < t <= (band + 1) * quarter]
        assert loss == pytest.approx(sum(t * t for t in steps) / len(steps), rel=1e-4)


def test_validation_of_black_images_has_the_overshoot_weight() -> None:
    data = noise_data()
    black = ImageSet(torch.zeros_like(data.validate.images), data.validate.labels)
    recipe = recipe_of("cosine", overshoot_weight=0.1)
    objective = DenoisingObjective(recipe, data.learn, black, torch.device("cpu"))
    for sign, expected in ((1, 0.1), (-1, 1)):  # more noise in the prediction means a darker image
        noise = iter((noise_of(objective) + sign).split(VALIDATION_BATCH))
        loss, _ = objective.validation_losses(lambda x_t, t, y, noise=noise: next(noise))
        assert loss == pytest.approx(expected, rel=1e-4)


def test_labels_are_dropped_at_the_recipes_rate_and_held_out_images_are_unused(
    objective: DenoisingObjective,
) -> None:
    seen: list[torch.Tensor] = []

    def watch(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return torch.zeros_like(x_t)

    loss_of = objective.loss_of(torch.Generator().manual_seed(0))
    rows = torch.arange(objective.num_examples)
    for _ in range(200):
        loss_of(watch, rows)
    y = torch.stack(seen)  # (200, N)
    labels = torch.arange(NUM_IMAGES - NUM_VALIDATION) % 10
    assert ((y == labels) | (y == 10)).all()
    assert (y == 10).double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / y.numel()) ** 0.5)


@pytest.mark.parametrize("num_images", [2, 72, 999])
def test_few_validation_images_have_all_timesteps_and_classes_in_each_quarter(num_images: int) -> None:
    images = torch.arange(num_images)
    rows = _validation_rows(num_images, torch.Generator().manual_seed(0))
    t = torch.arange(len(rows)) % 100
    assert t.bincount().tolist() == [10] * 100
    assert rows.bincount(minlength=num_images).min() >= 1000 // num_images
    for quarter in range(4):
        seen = rows[t // 25 == quarter]
        assert len(seen) == 250
        assert 0.3 < (seen < images[len(images) // 2]).double().mean() < 0.7  # both halves of the classes


def test_validation_uses_each_of_many_images_at_most_once_and_not_only_the_first_ones() -> None:
    rows = _validation_rows(30_000, torch.Generator().manual_seed(0))
    assert len(rows) == len(set(rows.tolist())) == 10_000
    assert 14_000 < rows.double().mean() < 16_000
    assert torch.equal(_validation_rows(5000, torch.Generator()), torch.arange(5000))
