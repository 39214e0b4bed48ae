"""The loads of the benchmarks: the requests, their rate, and other processes that disturb the machine."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from scripts.benchmark.clients import RequestMaker, RequestSpec

LARGEST_REQUEST = 64
PUBLISHED: dict[str, dict[str, Any]] = {  # evaluated settings: folder in docs/results/final -> fields of the request
    "ddpm": {},
    "dpmpp-50": {"sampler": "dpmpp", "num_steps": 50},
    "dpmpp-20": {"sampler": "dpmpp", "num_steps": 20},
    "dpmpp": {"sampler": "dpmpp", "num_steps": 10},
    "dpmpp-off": {"sampler": "dpmpp", "num_steps": 10, "guidance_scale": 1},
    "fast": {"model": "fast"},
    "fast-2": {"model": "fast", "num_steps": 2},
    "fast-1": {"model": "fast", "num_steps": 1},
}
NUM_STEPS = 100  # default number of steps of the service
ROWS_OF_ALL, ANSWERS_TO_ONE = "rows/s", "answers/s to the client of one image"  # units of the measured rates
UNGUIDED: dict[str, Any] = {"digit": 7, "guidance_scale": 1}
# The noise of diffusers, so that all servers must generate the same images.
PIPELINE_PROBE: dict[str, Any] = {"seed": 5, "num_steps": 2, "noise": "torch"}
FEW, FEW_STEPS = "10 steps", {"num_steps": 10, "sampler": "ddim"}
FLOOD_CONNECTIONS = 8
SPIN = "print(flush=True)\nwhile True: pass"
FLOOD = """
import http.client, sys, threading
def ask():
    connection = http.client.HTTPConnection(sys.argv[1])
    while True:
        connection.request("GET", "/livez")
        connection.getresponse().read()
threads = [threading.Thread(target=ask, daemon=True) for _ in range(int(sys.argv[2]))]
for thread in threads: thread.start()
print(flush=True)
threads[0].join()
"""  # the process ends when a request fails


@dataclass(frozen=True, slots=True)
class Load:
    """A load on a service.

    It is a closed loop if `clients` is given. It is an open loop with `rate` requests per second if `make_request` is
    given.
    """

    name: str
    clients: tuple[RequestMaker, ...] = ()  # each sends one request after the other
    make_request: RequestMaker | None = None
    rate: float = 0.0
    disturbance: Literal["", "busy core", "flood"] = ""

    @property
    def is_plain(self) -> bool:
        """True if every image needs 100 network calls, as in the requests that `one` returns."""
        makers = [maker for maker in (*self.clients, self.make_request) if maker]
        bodies = [one(0).body, *(maker(k).body for maker in makers for k in range(2))]
        return len({(body.get("guidance_scale"), body.get("num_steps")) for body in bodies}) == 1


def one(k: int) -> RequestSpec:
    """Returns the k-th request for one image in 100 steps without guidance."""
    return RequestSpec("one", {**UNGUIDED, "digit": k % 10, "seed": k})


def many(k: int) -> RequestSpec:
    """Returns the k-th request for LARGEST_REQUEST images."""
    return RequestSpec("64", {**one(k).body, "count": LARGEST_REQUEST})


def guided(make_request: RequestMaker) -> RequestMaker:
    """Returns the same requests with the recommended guidance of the checkpoint."""

    def guided_request(k: int) -> RequestSpec:
        request = make_request(k)
        body = {name: value for name, value in request.body.items() if name != "guidance_scale"}
        return RequestSpec(request.kind, body)

    return guided_request


def mixed(k: int) -> RequestSpec:
    """Returns the k-th request of a mix: every second request uses 10 steps instead of 100."""
    return RequestSpec(FEW, {**one(k).body, **FEW_STEPS}) if k % 2 else RequestSpec("100 steps", one(k).body)


def of_pipeline(num_steps: int) -> RequestMaker:
    """Returns the requests for one image of a pipeline in this number of steps."""
    kind = f"{num_steps} step{'s' if num_steps > 1 else ''}"
    return lambda k: RequestSpec(kind, {**PIPELINE_PROBE, "seed": k, "num_steps": num_steps})


def mixed_of_pipeline(k: int) -> RequestSpec:
    """Returns the k-th request of a mix: every second request uses 1 step instead of 50."""
    return of_pipeline(1 if k % 2 else 50)(k)


def clients_of_one(count: int) -> Load:
    """Returns a load of `count` clients with one image per request."""
    return Load(f"{count} x 1 image", (one,) * count)


def large() -> Load:
    """Returns a load of two clients with the largest requests, so that one request always waits."""
    return Load(f"2 x {LARGEST_REQUEST} images", (many,) * 2)


def one_large() -> Load:
    """Returns a load of one client with the largest requests."""
    return Load(f"1 x {LARGEST_REQUEST} images", (many,))


def closed_loads(clients: Sequence[int]) -> list[Load]:
    """Returns the loads of the mode `closed`.

    First these numbers of clients of one image, then large requests, a small and a large request together, the same
    with guidance, and large requests on a disturbed machine.
    """
    of_many = large()
    return [
        *map(clients_of_one, clients),
        of_many,
        Load(f"1 x 1 image with 1 x {LARGEST_REQUEST}", (one, many)),
        Load("1 x 1 image, guided", (guided(one),)),
        Load(f"1 x 1 image with 1 x {LARGEST_REQUEST}, guided", (guided(one), guided(many))),
        Load(f"{of_many.name}, guided", (guided(many),) * 2),
        Load(f"{of_many.name}, another process on one core", of_many.clients, disturbance="busy core"),
        Load(f"{of_many.name}, a flood of GET /livez", of_many.clients, disturbance="flood"),
    ]


def published_loads() -> list[Load]:
    """Returns the loads of the evaluated settings, named after them.

    Each setting has a load with one client of one image. The settings of `fast` also have one with two clients of
    LARGEST_REQUEST images, which shows how many images a second are possible.
    """

    def of(kind: str, fields: Mapping[str, Any]) -> RequestMaker:
        return lambda k: RequestSpec(kind, {"digit": k % 10, "seed": k, **fields})

    ones = [Load(name, (of("one", fields),)) for name, fields in PUBLISHED.items()]
    many = [
        Load(f"{name}, 2 x {LARGEST_REQUEST} images", (of("64", {"count": LARGEST_REQUEST, **fields}),) * 2)
        for name, fields in PUBLISHED.items()
        if name.startswith("fast")
    ]
    return ones + many


def open_loads(capacity: float, shares: Sequence[float]) -> list[Load]:
    """Returns Poisson arrivals of one image each. `shares` are fractions of `capacity` in images per second."""
    return [Load(f"{100 * share:g}% of capacity", make_request=one, rate=share * capacity) for share in shares]


def version_loads() -> dict[Load, str]:
    """Returns the loads of the mode `versions`, each with the unit of its rate.

    Throughput is counted in rows, since too few large requests complete in a measurement.
    """
    small, large = guided(one), guided(many)
    return {
        Load("64 x 1 image", (small,) * 64): ROWS_OF_ALL,
        Load(f"2 x {LARGEST_REQUEST} images", (large,) * 2): ROWS_OF_ALL,
        Load("1 x 1 image", (small,)): ANSWERS_TO_ONE,
        Load(f"1 x 1 image and 1 x {LARGEST_REQUEST}", (small, large)): ANSWERS_TO_ONE,
    }


@contextmanager
def disturbed(kind: str, url: str) -> Iterator[Callable[[], bool]]:
    """Runs a disturbing process until the block ends. Yields a function that returns True while it runs.

    A `busy core` process uses one core permanently. A `flood` process sends GET /livez as fast as possible to the
    service at `url`. If `kind` is empty, no process is run.
    """
    if not kind:
        yield lambda: True
        return
    address = url.removeprefix("http://")
    program = {"busy core": [SPIN], "flood": [FLOOD, address, str(FLOOD_CONNECTIONS)]}[kind]
    with subprocess.Popen([sys.executable, "-c", *program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield lambda: process.poll() is None
        finally:
            process.kill()
