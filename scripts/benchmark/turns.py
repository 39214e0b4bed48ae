"""Contestants side by side: all are started, and all but the one whose turn it is are stopped."""

import io
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from json import dumps
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from scripts.benchmark.contestants import BenchError, Contestant, Running, started
from scripts.benchmark.loads import UNGUIDED, Load
from scripts.benchmark.runs import Times, measure

PROBE = {"count": 4, "seed": 5}  # asked of each before it is measured
Pixels = npt.NDArray[np.uint8]
ONE_LEVEL = 1  # of 255: what rounding may make


def take_turns(
    contestants: Sequence[Contestant],
    loads: Sequence[Load],
    times: Times,
    repeats: Iterable[int],
    witness: Callable[[], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Each load under each contestant, once a repeat, in an order that rotates: being first is no one's own.

    `witness` looks at the machine while all are stopped, before and after each turn; what it says is in `beside`.
    """
    with all_started(contestants) as running:
        for repeat, load in product(repeats, loads):
            first = repeat % len(contestants)
            for contestant in [*contestants[first:], *contestants[:first]]:
                before = witness()
                with running[contestant.name].turn():
                    figures = measure(running[contestant.name], contestant, load, times, repeat)
                yield {"repeat": repeat, **figures, "beside": [before, witness()]}


@contextmanager
def all_started(contestants: Sequence[Contestant]) -> Iterator[dict[str, Running]]:
    """By name, each ready and stopped: one that idles takes processor time too.

    BenchError where one does not draw what the first one draws, if it has the same weights, or no pictures at all.
    """
    running, expected = dict[str, Running](), None
    with ExitStack() as stack:
        for contestant in contestants:
            one = running[contestant.name] = stack.enter_context(started(contestant))
            drawn = _picture(one)
            expected = drawn if expected is None else expected
            if drawn.shape != expected.shape or (contestant.is_of_our_network and _differ(drawn, expected)):
                raise BenchError(f"{contestant.name} draws other pictures than {contestants[0].name}")
            stack.enter_context(one.stopped())
        yield running


def _differ(drawn: Pixels, expected: Pixels) -> bool:
    return bool(np.abs(drawn.astype(int) - expected).max() > ONE_LEVEL)


def _picture(running: Running) -> Pixels:
    """The sheet of a few images, (H, W)."""
    body, headers = UNGUIDED | PROBE, {"Content-Type": "application/json", "Accept": "image/png"}
    asked = urllib.request.Request(f"{running.url}/generate", dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))
