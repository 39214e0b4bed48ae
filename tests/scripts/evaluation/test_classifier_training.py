from functools import cache
from pathlib import Path

import pytest
import torch

from model.diffusion import Diffusion
from model.pixels import to_pixels
from model.schedule import Schedule, ScheduleConfig
from model.spec import DIGITS
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation import classifier_training
from scripts.evaluation.classifier_training import (
    augment,
    facts_of,
    recipe_for,
    shift,
    train_and_save,
    train_classifier,
)
from scripts.evaluation.classifiers import DIGITS_SHAPE, KINDS, Classifier, Shape, accuracy, judge_for
from tests.scripts.evaluation.bars import bars

EVERY_KIND = pytest.mark.parametrize("kind", sorted(KINDS))


@cache
def trained(kind: str) -> Classifier:
    """Returns a classifier that is shared by the tests. They must not change it."""
    return train(kind, augmented=False, fogged=kind == "fog_judge")


def share_recognised(network: Classifier, images: ImageSet) -> float:
    return accuracy(network, images.images, images.labels)


def train(
    kind: str, *, augmented: bool, fogged: bool = False, seed: int = 0, epochs: int = 4, num_images: int = 640
) -> Classifier:
    torch.manual_seed(seed)
    with Reporter() as reporter:
        return train_classifier(
            KINDS[kind](DIGITS_SHAPE),
            bars(num_images, 1),
            reporter,
            augmented=augmented,
            fogged=fogged,
            epochs=epochs,
            batch_size=8,
            seed=seed,
        )


@EVERY_KIND
def test_classifier_learns_and_stores_its_accuracy_on_unseen_digits(kind: str) -> None:
    network = trained(kind)
    data = DataSet("bars", DIGITS, bars(640, 1), validate=bars(100, 2), test=bars(200, 3))
    facts = facts_of(network, data, epochs=4)
    assert facts["test_accuracy"] == share_recognised(network, data.test) > 0.9
    assert facts["validation_accuracy"] == share_recognised(network, data.validate) > 0.9
    assert (facts["num_test"], facts["epochs"]) == (200, 4)


@pytest.mark.parametrize("augmented", [True, False])
def test_training_is_reproducible_with_a_seed(augmented: bool) -> None:
    networks = (train("extractor", augmented=augmented, seed=seed, epochs=1, num_images=64) for seed in (3, 3, 4))
    first, again, other = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_set_smaller_than_a_batch_is_one_batch() -> None:
    torch.manual_seed(0)
    with Reporter() as reporter:
        network = train_classifier(KINDS["extractor"](DIGITS_SHAPE), bars(100, 1), reporter, augmented=False, epochs=8)
    assert share_recognised(network, bars(200, 3)) > 0.5


def test_classifier_trained_on_noisy_digits_recognises_noisy_digits() -> None:
    digits = bars(500, 2)
    diffusion = Diffusion(Schedule(ScheduleConfig(kind="cosine")), torch.Generator().manual_seed(9))
    x_t, _ = diffusion.add_noise(digits.images / 127.5 - 1, torch.full((500,), 60))
    plain, fogged = (accuracy(trained(kind), to_pixels(x_t), digits.labels) for kind in ("judge", "fog_judge"))
    assert fogged > 0.9 > plain


def test_augmentation_moves_images_a_little_and_keeps_their_levels() -> None:
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 11:17, 11:17] = 200
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.min() == 0 and moved.max() <= 200 / 255 + 1e-6
    mass = moved.sum(dim=(1, 2, 3))  # (B,)
    place = torch.arange(28.0)
    centre_x = (moved * place).sum(dim=(1, 2, 3)) / mass
    centre_y = (moved * place[:, None]).sum(dim=(1, 2, 3)) / mass
    furthest = torch.hypot(centre_x - 13.5, centre_y - 13.5).max()
    assert 2 < furthest < 2 * 2**0.5 / 0.9 + 0.1  # a shift of two pixels in x and y, divided by the smallest scale
    assert min(centre_x.std(), centre_y.std()) > 0.8
    assert mass.std() / mass.mean() > 0.05  # the images are scaled


@pytest.mark.parametrize("num_images", [2, 5])
def test_classifier_can_be_trained_on_very_few_images(num_images: int) -> None:
    with Reporter() as reporter:
        network = train_classifier(
            KINDS["judge"](DIGITS_SHAPE), bars(num_images, 1), reporter, augmented=True, epochs=5
        )
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_classifier_needs_two_images() -> None:
    with Reporter() as reporter, pytest.raises(ScriptError, match="at least 2 training images, but there are 1"):
        train_classifier(KINDS["extractor"](DIGITS_SHAPE), bars(1, 1), reporter, augmented=False, epochs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_only_matrices_decay(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    optimizers: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(
        classifier_training, "fit", lambda network, loss, batches, optimizer, *_, **__: optimizers.append(optimizer)
    )
    network = judge_for(Shape((channels, 28, 28)))
    images = ImageSet(torch.randint(256, (8, channels, 28, 28), dtype=torch.uint8), torch.arange(8))
    with Reporter() as reporter:
        train_classifier(network, images, reporter, augmented=True, epochs=1)
    decays = {p: group["weight_decay"] for group in optimizers[0].param_groups for p in group["params"]}
    assert {p: network.weight_decay * (p.ndim > 1) for p in network.parameters()} == decays


def test_colour_images_are_shifted_by_whole_pixels_and_repeat_their_border() -> None:
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    images[:, 1, 16, 16] = 255
    images[:, 2, 0] = 51
    moved = shift(images, torch.Generator().manual_seed(0))
    places = moved[:, 1].flatten(1).argmax(dim=1)
    assert (moved[:, 1].sum(dim=(1, 2)) == 1).all()
    assert set((places // 32).tolist()) == set((places % 32).tolist()) == {14, 15, 16, 17, 18}
    is_lower = places // 32 > 16
    assert torch.equal(moved[is_lower, 2, 0], torch.full((int(is_lower.sum()), 32), 0.2))
    assert (moved[:, 0] == 0).all()


def test_folder_that_cannot_be_written_is_noticed_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_training, "train_classifier", lambda *args, **options: pytest.fail("it has begun"))
    data = DataSet("bars", DIGITS, bars(20, 1), bars(20, 2), bars(20, 3))
    with Reporter() as reporter, pytest.raises(OSError, match=r"'/proc/self'$"):
        train_and_save("judge", Path("/proc/self/judge.safetensors"), data, reporter, recipe_for("judge", data))
