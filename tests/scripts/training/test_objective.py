import pytest
import torch

from scripts.training.objective import DenoisingObjective
from tests.scripts.tiny_training import NUM_IMAGES, NUM_STEPS, NUM_VALIDATION, noise_data, recipe_of


@pytest.fixture
def objective() -> DenoisingObjective:
    data = noise_data()
    return DenoisingObjective(recipe_of("cosine"), data.learn, data.validate, torch.device("cpu"))


def test_loss_of_a_zero_output_is_the_noise_variance_in_every_band(objective: DenoisingObjective) -> None:
    validation_loss, band_losses = objective.validation_losses(lambda x_t, t, y: torch.zeros_like(x_t))
    n = NUM_VALIDATION * 784
    assert abs(validation_loss - 1) < 5 * (2 / n) ** 0.5
    assert all(abs(loss - 1) < 5 * (2 / (n / 8)) ** 0.5 for loss in band_losses)


def test_bands_are_quarters_of_the_timesteps_with_least_noise_first(objective: DenoisingObjective) -> None:
    held_out = objective._held_out
    _, band_losses = held_out.losses(lambda x_t, t, y: held_out.target[: len(x_t)] + t[:, None, None, None])
    quarter = NUM_STEPS // 4
    for band, loss in enumerate(band_losses):
        steps = [t for t in held_out.t.tolist() if band * quarter < t <= (band + 1) * quarter]
        assert loss == pytest.approx(sum(t * t for t in steps) / len(steps), rel=1e-4)


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
