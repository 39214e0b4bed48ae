"""Fills in missing pixels: the path of timesteps, with the repeated steps of RePaint (Lugmayr 2022)."""

import math
from collections.abc import Sequence
from itertools import pairwise

from model.schedule import Schedule

NUM_LEVELS = 10  # recommended number of distinct timesteps
# Recommended number of times that each step after the first is taken, and recommended scale of guidance. With fewer
# repetitions or a larger scale, the border of the mask is visible.
NUM_RESAMPLINGS, INPAINTING_SCALE = 8, 1.5
CLASS_RESAMPLINGS, CLASS_PASSES = 2, 3  # of `recognition_path`
CLASS_MARGIN = 10.0  # a class is dropped if its distance exceeds the smallest one by more; pixels are in [-1, 1]
MIN_STEPS = 4  # number of steps before the first class is dropped


def inpainting_path(schedule: Schedule, num_levels: int, num_resamplings: int = NUM_RESAMPLINGS) -> list[int]:
    """Returns the path that fills in an image: `num_levels` timesteps evenly spaced in t, with repeated steps.

    It needs 1 + (num_levels - 1) * num_resamplings network calls without guidance. Raises ValueError if num_levels is
    not in 1..T.
    """
    return repaint_timesteps(schedule.even_timesteps(num_levels), num_resamplings)


def recognition_path(schedule: Schedule) -> list[int]:
    """Returns the path of a comparison by `ClassDistances`. It has only the noise levels at which the class matters.

    It goes down several times. Only the first pass starts from noise, at T. The later ones start from an image that
    fits the known pixels better, so they recognise more classes correctly.
    """
    levels = schedule.even_timesteps(min(NUM_LEVELS, schedule.num_steps))
    levels = [t for t in levels if t >= 0.3 * schedule.num_steps]
    if len(levels) < 3:  # a schedule with few steps
        return [schedule.num_steps, 0]
    later = repaint_timesteps(levels, CLASS_RESAMPLINGS)[1:]
    return [levels[0], *later * CLASS_PASSES]


def repaint_timesteps(timesteps: Sequence[int], num_resamplings: int) -> list[int]:
    """Returns a path that takes every step of `timesteps` `num_resamplings` times, except the first step.

    Before each repetition the path goes up again by one step, which adds the noise of the forward process. This is
    algorithm 1 of Lugmayr 2022 with jump length 1. One step fits the missing pixels to the known ones only partly.
    Each repetition improves the fit. The first step is not repeated, because the image before it is only noise.

    `timesteps` decrease. A step needs one network call (see `plan_through`). Example: 100, 50, 10, 0 with 2 resamplings
    becomes 100, 50, 10, 50, 10, 0, 10, 0. Raises ValueError if num_resamplings is below 1.
    """
    if num_resamplings < 1:
        raise ValueError(f"num_resamplings must be at least 1, got {num_resamplings}")
    path = list(timesteps[:2])
    for t, t_prev in pairwise(timesteps[1:]):
        path += [t_prev, *[t, t_prev] * (num_resamplings - 1)]
    return path


class ClassDistances:
    """Compares the classes of an image with missing pixels. Its state depends only on the errors that were added.

    The missing pixels are filled in once for each class, with the same noise. The distance of a class is the distance
    of its predicted x_0 from the known pixels, summed over the steps. A class is dropped if its distance exceeds the
    smallest one by more than CLASS_MARGIN.
    """

    has_own_images = True

    def __init__(self, num_classes: int, num_steps: int) -> None:
        """`num_steps` is the number of steps of the path."""
        self.num_classes, self._num_steps = num_classes, num_steps
        self.distances = [0.0] * num_classes  # infinite for a dropped class
        self.remaining = list(range(num_classes))
        self.evaluations = 0
        self._steps_done = 0

    def add(self, errors: Sequence[float]) -> None:
        """Adds the squared errors of a step at the known pixels, one for each class of `remaining`."""
        for label, error in zip(self.remaining, errors, strict=True):
            self.distances[label] += math.sqrt(error)
        self.evaluations += len(errors)
        self._steps_done += 1
        if self._steps_done >= MIN_STEPS:
            furthest = min(self.distances) + CLASS_MARGIN
            self.distances = [each if each <= furthest else math.inf for each in self.distances]
        left = [label for label, distance in enumerate(self.distances) if distance < math.inf]
        self.remaining = left if len(left) > 1 and self._steps_done < self._num_steps else []

    @property
    def label(self) -> int:
        """The class with the smallest distance so far."""
        return min(range(self.num_classes), key=self.distances.__getitem__)
