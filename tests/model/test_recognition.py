import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.noise import normal
from model.process import recognise
from model.recognition import CYCLE, MAX_NUM_PAIRS, RECOGNITION_SEED, Readout, Recognition, ink_of, timesteps
from model.spec import SHIPPED
from model.step import ReverseStep

CLASSES = range(10)


def readout(margin: float = 5.0, offsets: tuple[float, ...] = (0.0,) * 10) -> Readout:
    weights = tuple(1 + place / 10 for place in range(len(CYCLE)))
    typical, suspicion = ((1.0, 0.0),) * len(CYCLE), (2.0,) * len(CYCLE)
    table = (offsets,) * MAX_NUM_PAIRS
    return Readout("", weights, table, 4.0, margin, typical, suspicion, bias=-3.0, limit=1.0)


def far(*close: int, by: float = 1.0) -> list[float]:
    """Returns the errors of ten classes. The distance of the classes in `close` is smaller by `by`."""
    return [(10.0 - by * (y in close)) ** 2 for y in CLASSES]


@pytest.fixture(scope="module")
def step(path: Path) -> ReverseStep:
    return ReverseStep(checkpoint.load(path), torch.device("cpu"), torch.float32)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_more_pairs_continue_the_timesteps_of_fewer_pairs() -> None:
    longest = timesteps(MAX_NUM_PAIRS)
    assert all(timesteps(n) == longest[:n] for n in range(1, MAX_NUM_PAIRS + 1))
    assert set(longest) == set(CYCLE)


def test_timesteps_are_the_same_shares_of_a_schedule_of_another_length() -> None:
    assert timesteps(10, 1000) == tuple(10 * t for t in timesteps(10))
    assert min(timesteps(10, 1)) == 1


@pytest.mark.parametrize("num_pairs", [0, MAX_NUM_PAIRS + 1])
def test_num_pairs_out_of_range_is_an_error(num_pairs: int) -> None:
    with pytest.raises(ValueError, match=f"must be 1 to 100, got {num_pairs}"):
        timesteps(num_pairs)


def test_probabilities_are_the_softmax_of_the_weighted_distances() -> None:
    given = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)).double() + 1  # (K, C)
    offsets = tuple(y / 20 for y in CLASSES)
    constants = readout(offsets=offsets)
    answer = Recognition(constants, 0.0, 3, prune=False)
    for errors in given.tolist():
        answer.add(errors)
    weights = torch.tensor(constants.weights[:3], dtype=torch.float64)
    scores = weights @ given.sqrt() - 3 * torch.tensor(offsets, dtype=torch.float64)  # (C,)
    expected = (-scores / (1 + 3 / 4)).softmax(dim=0)
    assert answer.probabilities == pytest.approx(expected.tolist())
    assert answer.label == int(expected.argmax())
    assert answer.remaining == []
    assert answer.evaluations == 30


def test_improbable_class_is_dropped_and_keeps_its_log_odds() -> None:
    answer = Recognition(readout(margin=2.0), 0.0, 20)
    answer.add(far(3, 7, by=4.0))
    assert answer.remaining == [3, 7]
    behind = 4.0 / (1 + 1 / 4)
    answer.add([4.0, 4.0])
    probabilities = answer.probabilities
    assert probabilities[3] == probabilities[7]
    assert math.log(probabilities[3] / probabilities[0]) == pytest.approx(behind)
    assert sum(probabilities) == pytest.approx(1)
    assert answer.evaluations == 12


def test_class_within_the_margin_can_still_win() -> None:
    answer = Recognition(readout(margin=2.0), 0.0, 20)
    answer.add(far(3, by=2.0))  # the log-odds of 9 are 1.6 below those of the best class
    assert 9 in answer.remaining
    assert answer.label == 3
    answer.add([(6.0 if y == 9 else 10.0) ** 2 for y in answer.remaining])
    assert answer.label == 9


def test_pruning_keeps_the_digit_and_saves_evaluations() -> None:
    generator = torch.Generator().manual_seed(2)
    for digit in CLASSES:
        errors = (10 + 0.3 * torch.randn(20, 10, generator=generator)).square()  # (K, C)
        errors[:, digit] = (errors[:, digit].sqrt() - 3).square()
        all_classes, pruned = Recognition(readout(), 0.0, 20, prune=False), Recognition(readout(), 0.0, 20)
        for row in errors.tolist():
            all_classes.add(row)
            if pruned.remaining:
                pruned.add([row[y] for y in pruned.remaining])
        assert all_classes.label == pruned.label == digit
        assert pruned.evaluations < 0.4 * all_classes.evaluations


def test_suspicion_is_the_weighted_excess_of_the_log_distance_over_that_of_the_ink() -> None:
    ink = math.log(3)  # the typical distance is 3
    answer = Recognition(readout(), ink, 2)
    answer.add([4.0 if y == 6 else 100.0 for y in CLASSES])
    assert answer.suspicion == pytest.approx(-3 + 2 * math.log(2 / 3))
    assert answer.is_digit
    answer.add([900.0 if y == 6 else 10_000.0 for y in answer.remaining])
    assert answer.label == 6
    assert answer.suspicion == pytest.approx(-3 + 2 * math.log(2 / 3) + 2 * math.log(30 / 3))
    assert not Recognition(readout(), 0.0, 1).suspicion > -3
    answer = Recognition(readout(), ink, 1)
    answer.add([900.0] * 10)
    assert not answer.is_digit


def test_ink_is_the_logarithm_of_the_distance_to_black() -> None:
    images = torch.full((2, 1, 4, 4), -1.0)
    images[1, 0, 0, :4] = 0.0  # four pixels are 1 above black
    assert ink_of(images) == pytest.approx([0, math.log(1 + 2)])


def test_last_class_is_evaluated_once_at_every_timestep_and_then_no_more() -> None:
    answer = Recognition(readout(margin=2.0), 0.0, 50)
    answer.add(far(8, by=5.0))
    while answer.remaining:
        assert answer.remaining == [8]
        answer.add([1.0])
    assert len(answer.errors) == len(CYCLE)
    assert answer.evaluations == 10 + len(CYCLE) - 1


def test_wrong_number_of_errors_is_an_error() -> None:
    answer = Recognition(readout(), 0.0, 1)
    with pytest.raises(ValueError, match="9 errors for 10 remaining classes"):
        answer.add([1.0] * 9)
    answer.add([1.0] * 10)
    with pytest.raises(ValueError, match="0 errors for 0 remaining classes"):
        answer.add([])


def test_errors_are_those_of_the_predicted_x_0(step: ReverseStep, images: Tensor) -> None:
    answers = recognise(step, step.checkpoint.schedule, images, readout(), 4, prune=False)
    for pair in range(4):
        for answer, expected in zip(answers, expected_errors(step, images, pair).T.tolist(), strict=True):
            assert list(answer.errors[pair].values()) == pytest.approx(expected, rel=1e-3)


def expected_errors(step: ReverseStep, images: Tensor, pair: int) -> Tensor:
    """Returns the error of each class for each image, (10, N). They are computed from the predicted eps."""
    t = timesteps(pair + 1)[-1]
    alpha_bar = step.checkpoint.schedule.alpha_bar[t]
    eps = normal(torch.tensor([RECOGNITION_SEED]), torch.tensor([0]), torch.tensor([pair]), (1, 8, 8))
    x_t = (alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * eps).float()
    errors = []
    for label in CLASSES:
        predicted_eps = step.network(x_t, torch.full((3,), t), torch.full((3,), label))  # this checkpoint predicts eps
        errors.append((predicted_eps - eps).square().sum(dim=(1, 2, 3)) * (1 - alpha_bar) / alpha_bar)
    return torch.stack(errors)


def test_result_does_not_depend_on_the_other_images(step: ReverseStep, images: Tensor) -> None:
    together = recognise(step, step.checkpoint.schedule, images, readout(), 12)
    for image, answer in zip(images, together, strict=True):
        (alone,) = recognise(step, step.checkpoint.schedule, image[None], readout(), 12)
        assert alone.errors == answer.errors
        assert alone.probabilities == answer.probabilities


def test_pruned_run_evaluates_only_remaining_classes(step: ReverseStep, images: Tensor) -> None:
    every, pruned = (
        recognise(step, step.checkpoint.schedule, images, readout(margin=0.01), 3, prune=prune)
        for prune in (False, True)
    )
    for of_all, of_few in zip(every, pruned, strict=True):
        assert of_all.evaluations == 30
        assert of_few.evaluations < 30
        for pair, errors in enumerate(of_few.errors):
            assert errors.items() <= of_all.errors[pair].items()


def test_shipped_constants_are_for_the_shipped_weights() -> None:
    loaded = checkpoint.load(SHIPPED)
    constants = Readout.of(loaded.weights_sha256, 10)
    assert constants.weights_sha256 == loaded.weights_sha256
    assert (len(constants.weights), len(constants.offsets)) == (len(CYCLE), MAX_NUM_PAIRS)
    assert {len(offsets) for offsets in constants.offsets} == {10}
    assert all(sum(offsets) == pytest.approx(0, abs=0.01) for offsets in constants.offsets)


def test_other_weights_get_no_offsets(step: ReverseStep) -> None:
    constants = Readout.of(step.checkpoint.weights_sha256, 10)
    assert set(constants.offsets) == {(0.0,) * 10}
    assert constants.weights == Readout.of(checkpoint.load(SHIPPED).weights_sha256, 10).weights
