"""Routers: rules that choose the replica of the next request.

random               any replica
round robin          the replicas in turn
least connections    the replica with the fewest unanswered requests, as `balance leastconn` of HAProxy
two by requests      the one of two random replicas that has fewer unanswered requests, as Ray Serve by default
two by images        the one of two random replicas that has fewer unfinished images
least images         the replica with the fewest unfinished images
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class View:
    """What a router knows. Each list has one value for each replica."""

    requests: list[int]  # unanswered requests that the router has sent
    images: list[int]  # unfinished images, as the replica has reported them
    changed: list[int]  # the number of the last change of `requests`, counted over all replicas

    @classmethod
    def of(cls, num_replicas: int) -> "View":
        """Returns the view of idle replicas."""
        return cls([0] * num_replicas, [0] * num_replicas, [0] * num_replicas)

    def count_request(self, place: int, change: int, number: int) -> None:
        """Adds `change` to the unanswered requests of a replica. `number` is the number of this change."""
        self.requests[place] += change
        self.changed[place] = number


Router = Callable[[View], int]  # returns the place of a replica


def at_random(seed: int) -> Router:
    choose = random.Random(seed)
    return lambda view: choose.randrange(len(view.requests))


def round_robin(_: int) -> Router:
    numbers = count()
    return lambda view: next(numbers) % len(view.requests)


def least_connections(_: int) -> Router:
    """HAProxy chooses among equal replicas the one whose number of requests has been the same for the longest time."""
    return lambda view: min(range(len(view.requests)), key=lambda place: (view.requests[place], view.changed[place]))


def two_by_requests(seed: int) -> Router:
    return _two(seed, lambda view: view.requests)


def two_by_images(seed: int) -> Router:
    return _two(seed, lambda view: view.images)


def least_images(seed: int) -> Router:
    """Chooses among equal replicas at random."""
    choose = random.Random(seed)

    def route(view: View) -> int:
        fewest = min(view.images)
        return choose.choice([place for place, images in enumerate(view.images) if images == fewest])

    return route


def _two(seed: int, load_of: Callable[[View], list[int]]) -> Router:
    choose = random.Random(seed)

    def route(view: View) -> int:
        load = load_of(view)
        first, second = choose.sample(range(len(load)), 2)
        return first if load[first] <= load[second] else second

    return route


ROUTERS: dict[str, Callable[[int], Router]] = {  # name -> function of a seed
    "random": at_random,
    "round robin": round_robin,
    "least connections": least_connections,
    "two by requests": two_by_requests,
    "two by images": two_by_images,
    "least images": least_images,
}
BY_IMAGES = ("two by images", "least images")  # the routers that need the number of images of the replicas
