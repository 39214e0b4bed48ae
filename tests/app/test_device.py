from collections.abc import Iterator

import pytest
import torch

from app.device import MAX_FLOAT32_THREADS, choose_num_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def many_threads() -> Iterator[None]:
    """As on a larger machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wanted", "dtype", "expected"),
    [
        (None, torch.float32, MAX_FLOAT32_THREADS),
        (None, torch.bfloat16, 8),
        (1, torch.float32, 1),
        (2, torch.float32, 2),
        (3, torch.bfloat16, 3),
        (3, torch.float32, 3),
    ],
)
def test_float32_keeps_to_the_threads_at_which_bits_do_not_depend_on_the_batch(
    wanted: int | None, dtype: torch.dtype, expected: int
) -> None:
    choose_num_threads(wanted, CPU, dtype)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("wanted", "lines"), [(2, 0), (3, 1)])
def test_an_operator_who_wants_more_is_told_what_it_costs(
    wanted: int, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    choose_num_threads(wanted, CPU, torch.float32)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * lines
