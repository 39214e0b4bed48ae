import pytest
import torch

from app.engine.job import Options
from app.runner import plans
from app.runner.plans import Plans
from model.sampler import make_plan
from model.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
CPU = torch.device("cpu")


def options(num_steps: int, model: str = "default") -> Options:
    return Options(0, 0, num_steps, "ddim", 1.0, model)


@pytest.mark.parametrize("first_rows", [4, 1000])
def test_each_plan_stands_where_it_starts_however_many_come_after_it(
    monkeypatch: pytest.MonkeyPatch, first_rows: int
) -> None:
    monkeypatch.setattr(plans, "FIRST_ROWS", first_rows)
    table = Plans(CPU)
    starts = {num_steps: table.start_of(options(num_steps), SCHEDULE) for num_steps in (7, 100, 1, 30)}
    for num_steps, start in starts.items():
        expected = make_plan(SCHEDULE, "ddim", num_steps).table(CPU)
        assert torch.equal(table.table[start : start + num_steps], expected)


def test_a_plan_is_made_once_and_another_models_is_another() -> None:
    table = Plans(CPU)
    first = table.start_of(options(10), SCHEDULE)
    assert table.start_of(options(10), SCHEDULE) == first
    assert table.start_of(options(10, "fast"), SCHEDULE) == first + 10


def test_every_plan_of_a_hundred_steps_has_room() -> None:
    table = Plans(CPU)
    size = len(table.table)
    for sampler in ("ddpm", "ddim", "dpmpp"):
        for num_steps in range(1, 101):
            table.start_of(Options(0, 0, num_steps, sampler, 1.0), SCHEDULE)
    assert len(table.table) == size
