import math
from itertools import pairwise

import pytest

from model.paths import noise_above, num_steps_of, timesteps_along, timesteps_from, timesteps_of
from model.schedule import Schedule, ScheduleConfig
from model.spec import SAMPLERS, Sampler

COSINE = Schedule(ScheduleConfig())
T_IMAGE, T = 65, 85
EVERY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)


@EVERY_SAMPLER
@pytest.mark.parametrize("start", [1, 7, 64])
def test_timesteps_can_begin_below_the_last_one(sampler: Sampler, start: int) -> None:
    for num_steps in {1, start // 2 + 1, start}:
        timesteps = timesteps_of(COSINE, sampler, num_steps, start)
        assert timesteps[0] == start
        assert timesteps[-1] == 0
        assert len(timesteps) == num_steps + 1
        assert all(t > t_next for t, t_next in pairwise(timesteps))


@EVERY_SAMPLER
@pytest.mark.parametrize(("num_steps", "start"), [(0, 20), (21, 20), (1, 0), (1, 101)])
def test_start_or_num_steps_out_of_range_is_rejected(sampler: Sampler, num_steps: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"must be 1 to"):
        timesteps_of(COSINE, sampler, num_steps, start)


@EVERY_SAMPLER
def test_process_from_a_lower_timestep_has_steps_of_the_same_length(sampler: Sampler) -> None:
    assert timesteps_from(COSINE, sampler, 20, 100) == timesteps_of(COSINE, sampler, 20)
    timesteps = timesteps_from(COSINE, sampler, 20, 50)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (50, 0, 11)
    assert timesteps_from(COSINE, sampler, 100, 3) == [3, 2, 1, 0]
    assert timesteps_from(COSINE, sampler, 5, 3) == [3, 0]


def test_path_that_goes_up_has_a_step_from_each_timestep_to_the_next_lower_one() -> None:
    path = [100, 50, 80, 20, 0]
    assert timesteps_along(path) == [100, 80, 20, 0]
    assert num_steps_of(path) == 3


def test_noise_above_an_image_has_the_variance_of_a_higher_timestep() -> None:
    signal, noise = noise_above(COSINE, T_IMAGE, T)
    alpha_bar_image, alpha_bar = (COSINE.alpha_bar[t].item() for t in (T_IMAGE, T))
    variance_of_image = (1 - alpha_bar_image) / alpha_bar_image
    assert signal == pytest.approx(math.sqrt(alpha_bar))
    assert signal**2 * variance_of_image + noise**2 == pytest.approx(1 - alpha_bar)
    assert noise_above(COSINE, 0, T) == pytest.approx((math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)))
