import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.unet import UNetConfig
from scripts.training import adversary
from scripts.training.adversary import Adversary, Discriminator
from scripts.training.recipe import AdversaryRecipe

UNET = UNetConfig(num_steps=12, widths=(8,), num_classes=3, image_size=8)
RECIPE = AdversaryRecipe(width=8, lr=0.002, gradient_weight=0.1)
Y = torch.arange(30) % 3
T = torch.full((30,), 12)


def make(recipe: AdversaryRecipe = RECIPE, seed: int = 0) -> Adversary:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return Adversary(recipe, UNET, generator, bfloat16=False, compiled=False, capturable=False)


def squares(y: Tensor, *, noise: float, seed: int = 0) -> Tensor:
    """Returns 8 x 8 images with a white square whose place is that of the class, and with noise."""
    images = -torch.ones(len(y), 1, 8, 8)
    for image, label in zip(images, y.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 3, 2:5] = 1
    return images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def scores(of: Adversary, images: Tensor, y: Tensor = Y) -> Tensor:
    with torch.no_grad():
        return of.network(images, torch.full_like(y, 12), y)


def test_it_learns_to_give_real_images_higher_scores() -> None:
    tested = make()
    for seed in range(150):
        tested.learn(squares(Y, noise=0.02, seed=seed), squares(Y, noise=0.4, seed=seed + 100), T, Y)
    real, generated = squares(Y, noise=0.02, seed=7777), squares(Y, noise=0.4, seed=8888)
    assert (scores(tested, real) > scores(tested, generated)).double().mean() > 0.95


def test_an_image_of_another_class_than_asked_gets_a_lower_score() -> None:
    tested = make()
    for seed in range(150):
        asked, shown = squares(Y, noise=0.05, seed=seed), squares((Y + 1) % 3, noise=0.05, seed=seed + 1000)
        tested.learn(asked, shown, T, Y)
    right, wrong = squares(Y, noise=0.05, seed=7777), squares((Y + 1) % 3, noise=0.05, seed=8888)
    assert (scores(tested, right) > scores(tested, wrong)).double().mean() > 0.95


def test_the_loss_of_the_student_moves_its_images_and_leaves_the_adversary_alone() -> None:
    tested = make()
    for seed in range(150):
        tested.learn(squares(Y, noise=0.02, seed=seed), squares(Y, noise=0.4, seed=seed + 100), T, Y)
    tested.optimizer.zero_grad()
    before = copy.deepcopy(tested.network.state_dict())
    images, real = squares(Y, noise=0.4, seed=3).requires_grad_(), squares(Y, noise=0.02, seed=4)
    optimizer = torch.optim.Adam([images], lr=0.02)
    first = tested.loss(real, images, T, Y)
    for _ in range(40):
        optimizer.zero_grad()
        tested.loss(real, images, T, Y).backward()
        optimizer.step()
    assert tested.loss(real, images, T, Y) < 0.8 * first
    assert all(torch.equal(before[name], value) for name, value in tested.network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in tested.network.parameters())


def test_the_loss_is_that_of_relativistic_pairs() -> None:
    tested = make()
    real, generated = squares(Y, noise=0.1, seed=1), squares(Y, noise=0.3, seed=2)
    expected = F.softplus(scores(tested, real) - scores(tested, generated)).mean()
    torch.testing.assert_close(tested.loss(real, generated, T, Y), expected)


@pytest.mark.parametrize("part", [1, 3])
def test_the_penalty_is_the_squared_slope_along_the_noise(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a linear score, the mean of the squared slope along normal noise is the squared length of the gradient.

    The gradient depends on the class and the timestep, so a noisy image must be compared with its own score.
    """
    monkeypatch.setattr(adversary, "PENALTY_PART", part)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(5))
    y, t = torch.arange(6000) % 4, torch.arange(6000) % 5
    losses = []
    for weight in (0.0, 1.0):
        tested = make(RECIPE.model_copy(update={"gradient_weight": weight}))
        scale = torch.ones(()).requires_grad_()
        tested._scores = lambda x, t, y, scale=scale: scale * (1 + y + 10 * t) * (x.flatten(1) @ direction)
        images = torch.randn(6000, 1, 8, 8, generator=torch.Generator().manual_seed(6))
        tested.optimizer = torch.optim.SGD([scale], lr=1.0)
        tested.learn(images, images, t, y)
        losses.append(scale.grad.item())
    # The gradient of the penalty for the scale s is that of s^2 (1 + y + 10 t)^2 |direction|^2.
    assert losses[0] == pytest.approx(0, abs=1e-6)
    expected = 2 * (1 + y + 10 * t).square().double().mean() * direction.square().sum()
    assert losses[1] == pytest.approx(expected.item(), rel=0.1)


def test_scores_are_exact_enough_for_the_penalty_in_bfloat16() -> None:
    """bfloat16 has steps of 0.03 near 5, which the penalty would divide by PENALTY_STD."""
    generator = torch.Generator().manual_seed(0)
    tested = Adversary(RECIPE, UNET, generator, bfloat16=True, compiled=False, capturable=False)
    with torch.no_grad():
        tested.network.score.bias.fill_(5.0)
        scores = tested._score(squares(Y, noise=0.1), T, Y)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_restored_adversary_learns_the_same_bits() -> None:
    """The generator of the noise is that of the run, which restores it."""
    whole, other = make(), make(seed=1)
    steps = [(squares(Y, noise=0.02, seed=s), squares(Y, noise=0.4, seed=s + 100), T, Y) for s in range(4)]
    for step in steps[:2]:
        whole.learn(*step)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    other._generator.set_state(whole._generator.get_state())
    for step in steps[2:]:
        whole.learn(*step)
        other.learn(*step)
    ours, theirs = whole.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64)])
def test_a_discriminator_takes_images_of_any_size_and_colours(channels: int, size: int) -> None:
    unet = UNetConfig(image_channels=channels, image_size=size, num_classes=4)
    network = Discriminator(unet, 8)
    assert network(torch.zeros(2, channels, size, size), torch.tensor([100, 25]), torch.tensor([0, 3])).shape == (2,)
