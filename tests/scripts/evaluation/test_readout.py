import pytest
import torch
from torch import Tensor

from model.recognition import CYCLE, Readout
from scripts.evaluation.readout import fit_readout, fit_suspicion
from scripts.evaluation.recognize import calibration_error, figures_of, replayed

NUM_IMAGES, NUM_PAIRS = 600, 20
BEFORE = Readout("", (), (), 1.0, 8.0, (), (), 0.0, 0.0)


@pytest.fixture(scope="module")
def table() -> tuple[Tensor, Tensor, Tensor]:
    """Returns errors (N, K, C), labels (N,) and the offset (K, C) that each pair adds to the distance of each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (NUM_IMAGES,), generator=generator)
    offsets = 0.5 * torch.randn(NUM_PAIRS, 10, generator=generator)  # (K, C)
    noise = 0.3 * torch.randn(NUM_IMAGES, NUM_PAIRS, 10, generator=generator)
    lead = 0.12 * torch.nn.functional.one_hot(labels, 10)[:, None]  # (N, 1, C)
    return (10 + offsets + noise - lead).square(), labels, offsets


@pytest.fixture(scope="module")
def fitted(table: tuple[Tensor, Tensor, Tensor]) -> Readout:
    errors, labels, _ = table
    return fit_readout(errors[:400], labels[:400], BEFORE, "")


def accuracy(table: tuple[Tensor, Tensor, Tensor], readout: Readout, num_pairs: int) -> float:
    errors, labels, _ = table
    answers = [replayed(each, 0.0, readout, num_pairs, prune=False) for each in errors[400:]]
    return float(figures_of(answers, labels[400:])["accuracy"])


def test_offsets_are_those_of_the_errors(table: tuple[Tensor, Tensor, Tensor], fitted: Readout) -> None:
    true = table[2] - table[2].mean(dim=1, keepdim=True)  # (K, C)
    weights = torch.tensor(fitted.weights).repeat(NUM_PAIRS // len(CYCLE))  # (K,)
    expected, found = (weights[:, None] * true).cumsum(dim=0), torch.tensor(fitted.offsets)[:NUM_PAIRS].cumsum(dim=0)
    assert torch.corrcoef(torch.stack([expected.flatten(), found.flatten()]))[0, 1] > 0.95
    assert not any(map(any, fitted.offsets[NUM_PAIRS:]))


def test_fitted_constants_recognise_other_images_better(table: tuple[Tensor, Tensor, Tensor], fitted: Readout) -> None:
    plain = fitted.without_offsets(10)
    for num_pairs in (5, 20):
        assert accuracy(table, fitted, num_pairs) > accuracy(table, plain, num_pairs) + 0.1


def test_fitted_constants_are_calibrated_on_other_images(table: tuple[Tensor, Tensor, Tensor], fitted: Readout) -> None:
    errors, labels, _ = table
    for num_pairs in (3, 20):
        answers = [replayed(each, 0.0, fitted, num_pairs, prune=False) for each in errors[400:]]
        assert figures_of(answers, labels[400:])["calibration_error"] < 0.1


def test_classes_without_errors_are_left_out_of_the_fit(table: tuple[Tensor, Tensor, Tensor], fitted: Readout) -> None:
    errors, labels, _ = table
    pruned = errors.clone()
    distances = errors[:, :10].sqrt().sum(dim=1)  # (N, C)
    worst = distances.argsort(dim=1)[:, -2:]  # (N, 2)
    pruned[:, 10:] = pruned[:, 10:].scatter(2, worst[:, None].expand(-1, 10, 2), torch.nan)
    readout = fit_readout(pruned[:400], labels[:400], BEFORE, "")
    assert readout.weights == pytest.approx(fitted.weights, rel=0.5)
    assert accuracy(table, readout, 20) > accuracy(table, fitted, 20) - 0.05


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = 0.1 + 0.9 * torch.rand(50_000, generator=generator)
    is_right = torch.rand(50_000, generator=generator) < confidence
    assert calibration_error(confidence, is_right) < 0.01
    assert calibration_error(torch.full((4,), 0.9), torch.tensor([True, True, False, False])) == pytest.approx(0.4)


def test_suspicion_separates_images_with_larger_distances_from_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    ink, other_ink = (2 + torch.rand(count, generator=generator) for count in (1000, 200))
    distances, others = (
        ink[:, None] + 0.1 * torch.randn(len(ink), 10, generator=generator) for ink in (ink, other_ink)
    )
    others[:, 3] += 0.4  # only one timestep separates them
    readout = fit_suspicion(BEFORE, (2 * distances).exp(), ink, (2 * others).exp(), other_ink, torch.arange(200) % 2)
    assert [slope for slope, _ in readout.typical] == pytest.approx([1] * 10, abs=0.05)
    assert max(range(10), key=readout.suspicion.__getitem__) == 3
    excess = torch.tensor(readout.suspicion) * (distances - ink[:, None])  # (N, 10); typical distances are exp(ink)
    assert (excess.sum(dim=1) + readout.bias > readout.limit).float().mean() == pytest.approx(0.01, abs=0.005)
    excess = torch.tensor(readout.suspicion) * (others - other_ink[:, None])  # (M, 10)
    assert (excess.sum(dim=1) + readout.bias > readout.limit).float().mean() > 0.8
