from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from model.diffusion import Diffusion, running_average
from model.schedule import Schedule, ScheduleConfig

NULL = 10


@pytest.fixture
def make_diffusion() -> Callable[[], Diffusion]:
    return lambda: Diffusion(Schedule(ScheduleConfig()), torch.Generator().manual_seed(0))


@pytest.fixture
def diffusion(make_diffusion: Callable[[], Diffusion]) -> Diffusion:
    return make_diffusion()


def test_add_noise_has_the_mean_and_variance_of_equation_4(diffusion: Diffusion) -> None:
    x_0 = torch.tensor([-1.0, 0.25, 0.5, 1.0])[:, None, None, None].expand(-1, 1, 300, 300)
    t = torch.tensor([1, 30, 70, 100])
    x_t, _ = diffusion.add_noise(x_0, t)
    for row, image, step in zip(x_t.double(), x_0, t, strict=True):
        alpha_bar = Schedule(ScheduleConfig()).alpha_bar[step]
        n, variance = row.numel(), 1 - alpha_bar
        assert abs(row.mean() - alpha_bar.sqrt() * image[0, 0, 0]) < 5 * (variance / n) ** 0.5
        assert abs(row.var() / variance - 1) < 5 * (2 / n) ** 0.5


def test_add_noise_returns_the_noise_in_x_t(diffusion: Diffusion) -> None:
    x_0, t = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([5, 50, 95])
    x_t, eps = diffusion.add_noise(x_0, t)
    for i, step in enumerate(t.tolist()):
        alpha_bar = diffusion.alpha_bar[step].item()
        torch.testing.assert_close(x_t[i], alpha_bar**0.5 * x_0[i] + (1 - alpha_bar) ** 0.5 * eps[i])


def test_add_noise_uses_the_given_noise(diffusion: Diffusion) -> None:
    x_0, eps = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    x_t, same_eps = diffusion.add_noise(x_0, torch.tensor([0, 100]), eps)
    assert same_eps is eps
    assert torch.equal(x_t[0], x_0[0])  # t = 0 is the clean image
    assert (x_t[1] - eps[1]).abs().max() < 1e-3  # t = 100 is pure noise


def test_timesteps_are_uniform_from_1_to_num_steps(diffusion: Diffusion) -> None:
    counts = diffusion.draw_timesteps(100_000).bincount(minlength=101)
    assert len(counts) == 101
    assert counts[0] == 0
    assert (counts[1:] - 1000).abs().max() < 5 * 1000**0.5


def test_labels_are_dropped_with_the_given_probability(diffusion: Diffusion) -> None:
    assert abs(diffusion.draw_label_mask(100_000, 0.1).double().mean() - 0.1) < 5 * (0.09 / 100_000) ** 0.5
    assert not diffusion.draw_label_mask(1000, 0.0).any()


def test_train_step_passes_noisy_images_timesteps_and_masked_labels(
    make_diffusion: Callable[[], Diffusion],
) -> None:
    x_0, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 5])
    c_mask = torch.tensor([True, False, False, True, False, True])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def denoiser(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x_t, t, y))
        return torch.full_like(x_t, 0.5)

    loss = make_diffusion().train_step(denoiser, x_0, y, c_mask, NULL)
    [(x_t, t, labels)] = seen
    repeated = make_diffusion()
    same_t = repeated.draw_timesteps(6)
    same_x_t, eps = repeated.add_noise(x_0, same_t)
    assert torch.equal(t, same_t)
    assert torch.equal(x_t, same_x_t)
    assert labels.tolist() == [NULL, 1, 2, NULL, 4, NULL]
    assert y.tolist() == [0, 1, 2, 3, 4, 5]
    assert loss.item() == pytest.approx(((eps - 0.5) ** 2).mean().item())


def test_loss_of_a_perfect_denoiser_is_zero(diffusion: Diffusion) -> None:
    x_0, y = torch.rand(16, 1, 8, 8) * 2 - 1, torch.zeros(16).long()

    def denoiser(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha_bar_t = diffusion.alpha_bar[t][:, None, None, None]
        return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()

    assert diffusion.train_step(denoiser, x_0, y, torch.zeros(16).bool(), NULL) < 1e-6


def test_loss_of_bfloat16_output_is_computed_in_float32(diffusion: Diffusion) -> None:
    x_0, y = torch.zeros(4, 1, 8, 8), torch.zeros(4).long()
    loss = diffusion.train_step(lambda x_t, t, y: x_t.bfloat16(), x_0, y, torch.zeros(4).bool(), NULL)
    assert loss.dtype == torch.float32


def test_same_seed_gives_the_same_random_numbers(make_diffusion: Callable[[], Diffusion]) -> None:
    def draws(diffusion: Diffusion) -> list[Tensor]:
        x_0 = torch.zeros(2, 1, 8, 8)
        t = diffusion.draw_timesteps(2)
        return [t, *diffusion.add_noise(x_0, t), diffusion.draw_label_mask(9, 0.5)]

    assert all(torch.equal(a, b) for a, b in zip(draws(make_diffusion()), draws(make_diffusion()), strict=True))


def average_of(network: nn.Module, max_decay: float) -> AveragedModel:
    """Returns an average that starts with the weights of the network."""
    average = AveragedModel(network, multi_avg_fn=running_average(max_decay))
    average.n_averaged.fill_(1)
    return average


@pytest.mark.parametrize("max_decay", [0.9999, 0.7])
def test_average_of_a_constant_network_converges_as_the_decay_predicts(max_decay: float) -> None:
    network = nn.Linear(3, 2)
    start = network.weight.detach().clone()
    average = average_of(network, max_decay)
    with torch.no_grad():
        network.weight.fill_(5.0)
    left = 1.0
    for step in range(1, 41):
        average.update_parameters(network)
        left *= min(max_decay, 1 - (1 + step) ** (-2 / 3))
        torch.testing.assert_close(average.module.weight.detach(), 5 + left * (start - 5), rtol=1e-5, atol=1e-6)


def test_average_is_the_weighted_sum_of_all_past_weights() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = average_of(network, 0.5)
    values = [network.weight.item()]
    for value in (3.0, -1.0, 4.0, 1.5):
        nn.init.constant_(network.weight, value)
        values.append(value)
        average.update_parameters(network)
    decays = [min(0.5, 1 - (1 + k) ** (-2 / 3)) for k in range(1, 5)]
    weights = [1.0] + [1 - decay for decay in decays]
    for k, decay in enumerate(decays, start=1):
        weights[:k] = [weight * decay for weight in weights[:k]]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_average_with_zero_decay_equals_the_network() -> None:
    network = nn.Linear(3, 2)
    average = average_of(network, 0.0)
    nn.init.normal_(network.weight)
    average.update_parameters(network)
    assert torch.equal(average.module.weight, network.weight)


def test_average_shares_no_memory_with_the_network() -> None:
    network = nn.Linear(3, 2)
    average = average_of(network, 0.99)
    before = average.module.weight.clone()
    with torch.no_grad():
        network.weight.zero_()
    assert torch.equal(average.module.weight, before)
