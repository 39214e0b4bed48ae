from collections.abc import Iterator

import pytest
import torch

from app.device import MAX_PLAIN_THREADS, choose_num_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a larger machine, without a limit."""
    monkeypatch.setattr("app.device.granted_cores", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wanted", "dtype", "compiled", "expected"),
    [
        (None, torch.float32, True, 8),
        (None, torch.float32, False, MAX_PLAIN_THREADS),
        (None, torch.bfloat16, False, 8),
        (None, torch.bfloat16, True, 8),
        (1, torch.float32, True, 1),
        (2, torch.float32, True, 2),
        (3, torch.bfloat16, True, 3),
        (3, torch.bfloat16, False, 3),
        (3, torch.float32, True, 3),
    ],
)
def test_float32_not_compiled_keeps_to_the_threads_at_which_bits_do_not_depend_on_the_batch(
    wanted: int | None, dtype: torch.dtype, compiled: bool, expected: int
) -> None:
    choose_num_threads(wanted, CPU, dtype, compiled=compiled)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("granted", "expected"), [(None, 8), (1.5, 2), (0.5, 1), (16.0, 8)])
def test_a_container_is_not_given_more_threads_than_it_has_time_for(
    granted: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.device.granted_cores", lambda: granted)
    choose_num_threads(None, CPU, torch.bfloat16, compiled=True)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("wanted", "compiled", "lines"), [(2, False, 0), (3, False, 1), (3, True, 0)])
def test_an_operator_who_wants_more_is_told_what_it_costs(
    wanted: int, compiled: bool, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    choose_num_threads(wanted, CPU, torch.float32, compiled=compiled)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * lines
