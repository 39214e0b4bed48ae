import math

import pytest

from model.editing import start_timestep
from model.schedule import Schedule, ScheduleConfig

SCHEDULES = [Schedule(ScheduleConfig(kind=kind, num_steps=n)) for kind in ("cosine", "linear") for n in (100, 1000)]
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.alpha_bar[-1]:.0e}-{s.num_steps}")


@EVERY_SCHEDULE
def test_strength_0_keeps_the_sketch_and_strength_1_starts_from_noise(schedule: Schedule) -> None:
    assert start_timestep(schedule, 0) == 0
    assert start_timestep(schedule, 1) == schedule.num_steps


@EVERY_SCHEDULE
def test_timestep_never_falls_as_strength_grows(schedule: Schedule) -> None:
    timesteps = [start_timestep(schedule, i / 100) for i in range(101)]
    assert timesteps == sorted(timesteps)
    assert timesteps[1] >= 1


@EVERY_SCHEDULE
def test_strength_means_the_same_noise_level_under_every_schedule(schedule: Schedule) -> None:
    for strength in (0.4, 0.5, 0.6, 0.7):
        snr = math.exp(8 * (1 - 2 * strength))  # the log-SNR falls linearly from 8 to -8
        t = start_timestep(schedule, strength)
        around = schedule.alpha_bar[t - 1 : t + 2] / (1 - schedule.alpha_bar[t - 1 : t + 2])  # (3,)
        assert around[0] > snr > around[2]
        nearest = (around.log() - math.log(snr)).abs().argmin()
        assert nearest == 1


@pytest.mark.parametrize("strength", [-0.01, 1.01, math.nan])
def test_strength_out_of_range_is_rejected(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be 0 to 1, got"):
        start_timestep(SCHEDULES[0], strength)
