"""Tests of the rules that choose a replica. The rule of HAProxy is compared with HAProxy itself."""

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from scripts.benchmark.routers import ROUTERS, Router, View
from tests.e2e.process import wait_until
from tests.scripts.benchmark.balancer import Balancer, HeldRequest


def view_of(requests: Sequence[int], images: Sequence[int] = (0, 0, 0)) -> View:
    return View(list(requests), list(images), [0] * len(requests))


def places(router: Router, view: View, often: int = 200) -> Counter[int]:
    return Counter(router(view) for _ in range(often))


def test_random_uses_all_replicas_equally() -> None:
    found = places(ROUTERS["random"](1), view_of([9, 0, 0]), often=3000)
    assert all(900 < found[place] < 1100 for place in range(3))


def test_round_robin_takes_the_replicas_in_turn() -> None:
    router, view = ROUTERS["round robin"](1), view_of([9, 0, 0])
    assert [router(view) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_connections_prefers_the_replica_that_changed_first_among_equal_ones() -> None:
    router, view = ROUTERS["least connections"](1), view_of([2, 1, 2])
    assert router(view) == 1
    for number, (place, change) in enumerate([(1, 1), (0, -1), (0, 1)], 1):
        view.count_request(place, change, number)
    assert (view.requests, router(view)) == ([2, 2, 2], 2)


@pytest.mark.parametrize(("name", "best"), [("two by requests", 0), ("two by images", 2)])
def test_two_choices_never_take_the_worst_and_take_the_best_of_three_in_two_thirds(name: str, best: int) -> None:
    found = places(ROUTERS[name](1), view_of([1, 2, 3], images=[30, 20, 10]), often=3000)
    assert 1900 < found[best] < 2100
    assert found[2 - best] == 0


def test_least_images_chooses_among_equal_replicas_at_random() -> None:
    found = places(ROUTERS["least images"](1), view_of([0, 0, 0], images=[7, 3, 3]))
    assert found[0] == 0
    assert min(found[1], found[2]) > 70


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")
def test_least_connections_chooses_the_same_replicas_as_haproxy(tmp_path: Path) -> None:
    choose, view, num_servers, changes = random.Random(8), View.of(3), 3, itertools.count(1)
    router, open_requests, chosen = ROUTERS["least connections"](1), list[HeldRequest](), list[tuple[int, int]]()
    with ExitStack() as stack:
        balancer = Balancer(num_servers, tmp_path, stack)
        for _ in range(80):
            if open_requests and choose.random() < 0.45:
                ended = open_requests.pop(choose.randrange(len(open_requests)))
                ended.end()
                view.count_request(ended.place, -1, next(changes))
                wait_until(partial(balancer.has_requests, view.requests), "HAProxy has counted the end")
            else:
                expected = router(view)
                open_requests.append(balancer.send())
                place = open_requests[-1].place
                view.count_request(place, 1, next(changes))
                chosen.append((place, expected))
        for request in open_requests:
            request.end()
    assert len(chosen) > 40
    assert [place for place, _ in chosen] == [expected for _, expected in chosen]
    assert set(dict(chosen)) == set(range(num_servers))
