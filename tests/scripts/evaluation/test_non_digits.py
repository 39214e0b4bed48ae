import torch

from scripts.evaluation.non_digits import HALVED, non_digits
from tests.scripts.evaluation.bars import bars


def test_every_kind_has_different_images_of_28_by_28_pixels() -> None:
    kinds = non_digits(bars(200, 0), 12, seed=1)
    assert len(kinds) == 14
    for name, pictures in kinds.items():
        assert pictures.shape == (12, 1, 28, 28), name
        assert pictures.dtype == torch.uint8
        assert len(pictures.flatten(1).unique(dim=0)) > 2, name


def test_same_seed_gives_the_same_images() -> None:
    digits = bars(200, 0)
    first, second, other = (non_digits(digits, 5, seed=seed) for seed in (1, 1, 2))
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["letters"].equal(other["letters"])


def test_letters_fit_into_the_box_of_a_digit_and_are_centred_by_mass() -> None:
    letters = non_digits(bars(200, 0), 30, seed=0)["letters"][:, 0].float()  # (N, H, W)
    rows, columns = (letters.amax(dim=dim).gt(0).sum(dim=1) for dim in (2, 1))  # (N,) each
    assert max(int(rows.max()), int(columns.max())) <= 20
    mass = letters.sum(dim=(1, 2))
    for dim in (1, 2):
        centre = (letters.sum(dim=3 - dim) * torch.arange(28)).sum(dim=1) / mass
        assert (centre - 13.5).abs().max() < 1.5


def test_half_of_the_rows_of_an_erased_digit_are_black() -> None:
    digits = bars(200, 0)
    upper, lower = (non_digits(digits, 5, seed=0)[f"{half} half erased"] for half in ("upper", "lower"))
    assert not upper[:, :, :14].any()
    assert not lower[:, :, 14:].any()
    whole = torch.maximum(upper, lower)
    of_halved = digits.rows(torch.isin(digits.labels, torch.tensor(HALVED)))
    assert all((of_halved.images == picture).all(dim=(1, 2, 3)).any() for picture in whole)
