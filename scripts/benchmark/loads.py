"""The loads: who asks for what, how often, and what else the machine does meanwhile."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from scripts.benchmark.clients import Ask, Asks

LARGEST_REQUEST = 64
NUM_STEPS = 100  # of a request that does not set num_steps
ROWS_OF_ALL, ANSWERS_TO_ONE = "rows/s", "answers/s to the client of one image"  # units of a rate
UNGUIDED: dict[str, Any] = {"digit": 7, "guidance_scale": 1}
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
"""  # it ends when a request fails


@dataclass(frozen=True, slots=True)
class Load:
    """Clients that ask one after the other, or requests at random times, `rate` a second."""

    name: str
    clients: tuple[Asks, ...] = ()
    asks: Asks | None = None
    rate: float = 0.0
    disturbance: Literal["", "busy core", "flood"] = ""

    @property
    def is_plain(self) -> bool:
        """Whether every image takes as many calls of the network as that of `one`, a hundred."""
        asked = [asks(k).body for asks in (*self.clients, self.asks) if asks for k in range(2)]
        as_one = [(body.get("guidance_scale"), body.get("num_steps")) for body in (*asked, one(0).body)]
        return len(set(as_one)) == 1


def one(k: int) -> Ask:
    """One image in 100 steps."""
    return Ask("one", {**UNGUIDED, "digit": k % 10, "seed": k})


def many(k: int) -> Ask:
    """The largest request."""
    return Ask("64", {**one(k).body, "count": LARGEST_REQUEST})


def guided(asks: Asks) -> Asks:
    """The same with the guidance that the checkpoint recommends."""

    def ask(k: int) -> Ask:
        asked = asks(k)
        return Ask(asked.kind, {name: value for name, value in asked.body.items() if name != "guidance_scale"})

    return ask


def mixed(k: int) -> Ask:
    """Every other request is one of ten steps."""
    return Ask(FEW, {**one(k).body, **FEW_STEPS}) if k % 2 else Ask("100 steps", one(k).body)


def clients_of_one(count: int) -> Load:
    """So many clients of one image a request."""
    return Load(f"{count} x 1 image", (one,) * count)


def large() -> Load:
    """Two clients of the largest requests: there is always one that waits."""
    return Load(f"2 x {LARGEST_REQUEST} images", (many,) * 2)


def one_large() -> Load:
    """Returns one client of the largest requests."""
    return Load(f"1 x {LARGEST_REQUEST} images", (many,))


def closed_loads(clients: Sequence[int]) -> list[Load]:
    """Ever more clients of one image; large requests; an image beside them; guided; on a disturbed machine."""
    of_many = large()
    return [
        *map(clients_of_one, clients),
        of_many,
        Load(f"1 x 1 image beside 1 x {LARGEST_REQUEST}", (one, many)),
        Load("1 x 1 image, guided", (guided(one),)),
        Load(f"1 x 1 image beside 1 x {LARGEST_REQUEST}, guided", (guided(one), guided(many))),
        Load(f"{of_many.name}, guided", (guided(many),) * 2),
        Load(f"{of_many.name}, another process on one core", of_many.clients, disturbance="busy core"),
        Load(f"{of_many.name}, a flood of GET /livez", of_many.clients, disturbance="flood"),
    ]


def open_loads(capacity: float, shares: Sequence[float]) -> list[Load]:
    """Poisson arrivals of one image each, at shares of so many images a second."""
    return [Load(f"{share:g} of capacity", asks=one, rate=share * capacity) for share in shares]


def version_loads() -> dict[Load, str]:
    """Returns the loads, each with the unit of its rate.

    Throughput is counted in rows, since a large request ends too rarely.
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
    """Runs a process until the block ends, and yields a function that returns True while it runs.

    With `busy core` the process computes. With `flood` it sends GET /livez as fast as possible to the service at `url`.
    Without a kind it runs no process.
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
