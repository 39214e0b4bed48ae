"""Redraws a sketch: the timestep at which the reverse process starts (SDEdit, Meng 2022, algorithm 1)."""

from model.schedule import Schedule

# The half log-SNR near strength 0, and its negative near strength 1. Near strength 0, the standard deviation of the
# noise is 2% of that of the image. Near strength 1, it is the reverse. A larger ratio makes no visible difference.
MAX_HALF_LOG_SNR = 4.0


def start_timestep(schedule: Schedule, strength: float) -> int:
    """Returns the timestep up to which noise is added to a sketch, for a strength in 0..1.

    Strength 0 is timestep 0: the sketch without noise. Strength 1 is T: noise without the sketch. In between, strength
    is a share of a fixed range of log-SNR, so it means the same noise level under every schedule. At strength 0.5,
    image and noise have equal weights. The result is the timestep with the nearest log-SNR. Raises ValueError if the
    strength is out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be 0 to 1, got {strength}")
    if strength in (0, 1):
        return schedule.num_steps if strength else 0
    half_log_snr = MAX_HALF_LOG_SNR * (1 - 2 * strength)
    return int((schedule.half_log_snr[1:] - half_log_snr).abs().argmin()) + 1
