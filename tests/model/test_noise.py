import pytest
import torch
from torch import Tensor

from model import noise
from model.noise import normal, philox

SHAPE = (1, 28, 28)
WORD = 0xFFFFFFFF


def rows(seeds: list[int], indices: list[int] | None = None, steps: list[int] | None = None) -> Tensor:
    """Returns the noise (B, 784) for seeds, indices and steps."""
    zeros = [0] * len(seeds)
    keys = (torch.tensor(seeds), torch.tensor(indices or zeros), torch.tensor(steps or zeros))
    return normal(*keys, SHAPE).flatten(1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert tuple(word.item() for word in philox((c0, c1, c2, c3), (k0, k1))) == words


def test_noise_is_standard_normal() -> None:
    z = rows(list(range(3000))).double().flatten()
    n = len(z)  # 2,352,000 values; each moment is compared within 5 standard errors
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    within_1 = (z.abs() < 1).double().mean()
    assert abs(within_1 - 0.6826895) < 5 * (0.6827 * 0.3173 / n) ** 0.5


def test_neighbouring_pixels_are_independent() -> None:
    z = rows(list(range(300))).double()
    for lag in (1, 2, 3, 4, 28, 196):
        product = (z[:, :-lag] * z[:, lag:]).mean()
        assert abs(product) < 5 / (z.numel() - 300 * lag) ** 0.5


def test_row_has_the_same_bits_in_any_batch() -> None:
    seeds, indices, steps = [7, 2**53 - 1, 7, 0, 2**32], [0, 3, 1, 63, 0], [0, 100, 0, 5, 1]
    together = rows(seeds, indices, steps)
    for i in range(5):
        alone = rows(seeds[i : i + 1], indices[i : i + 1], steps[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert torch.equal(rows(seeds[::-1], indices[::-1], steps[::-1]), together.flip(0))


@pytest.mark.parametrize("varied", ["seeds", "indices", "steps"])
def test_rows_that_differ_in_one_key_are_uncorrelated(varied: str) -> None:
    keys = {"seeds": [5] * 64, "indices": [5] * 64, "steps": [5] * 64} | {varied: list(range(64))}
    z = rows(**keys).double()  # (64, 784)
    correlation = (z @ z.T / 784).fill_diagonal_(0)  # each value is approximately N(0, 1/784)
    assert correlation.abs().max() < 5.5 / 784**0.5


def test_seed_index_and_step_are_not_interchangeable() -> None:
    z = rows([1, 0, 0], [0, 1, 0], [0, 0, 1]).double()
    correlation = (z @ z.T / 784).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 784**0.5


@pytest.mark.parametrize("seed", [2**32, 2**33, 2**52, 5 * 2**32])
def test_upper_bits_of_a_seed_change_the_noise(seed: int) -> None:
    low, high = rows([0, seed]).double()
    assert abs((low * high).mean()) < 5 / 784**0.5


def test_image_size_that_is_not_a_multiple_of_four_truncates_the_noise() -> None:
    key = torch.tensor([3, 4])
    small = normal(key, key, key, (1, 3, 3))
    assert torch.equal(small.flatten(1), normal(key, key, key, (1, 4, 4)).flatten(1)[:, :9])
    assert small.is_contiguous()  # compiled steps need contiguous inputs


def test_noise_is_finite_over_millions_of_draws() -> None:
    z = normal(torch.arange(40), torch.zeros(40).long(), torch.zeros(40).long(), (1, 256, 256))
    assert z.dtype == torch.float32
    assert z.isfinite().all()
    assert 4 < z.abs().max() < 7  # the largest of 2.6 million normal values is above 4 almost surely


def test_noise_of_words_that_are_0_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 4 billion words is 0, and the logarithm of 0 is infinite."""
    monkeypatch.setattr(noise, "random_words", lambda *of_rows: torch.zeros(4, 1, 1, dtype=torch.int64))
    number = torch.zeros(1, dtype=torch.int64)
    assert normal(number, number, number, (1, 2, 2)).isfinite().all()
