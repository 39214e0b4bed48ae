"""Tests that a runner returns freed memory to the kernel."""

import pytest

from app.runner import runner as module
from model.checkpoint import Checkpoint
from tests.app.runner.rows import new_runner, rows_of, step


def test_freed_memory_is_returned_after_a_fixed_number_of_steps(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, rows, returned_after = new_runner(loaded), rows_of(num_steps=10), list[int]()
    monkeypatch.setattr(module, "STEPS_UNTIL_TRIM", 4)
    monkeypatch.setattr(module, "return_freed_memory", lambda: returned_after.append(rows[0].step + 1))
    for _ in range(10):
        step(runner, rows)
    assert returned_after == [4, 8]
