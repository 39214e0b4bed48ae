"""Measures two Ray nodes with one core each: this machine, and a network namespace with a link to it."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import pytest

from model.spec import SHIPPED
from tests.e2e.process import TIMEOUT
from tests.e2e.ray_cluster import RayCluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("ray"), reason="needs the extra ray"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and the program ip"),
    pytest.mark.timeout(1200),
]

ADDRESSES = ("10.77.49.1", "10.77.49.2")
CLIENTS, SECONDS, REPEATS = 4, 20.0, 5
BODY = {"digit": 7, "count": 16, "num_steps": 20, "sampler": "ddim"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def launchers() -> Iterator[list[list[str]]]:
    """Creates the namespace. Returns for each node the command that runs a program there, on its own core.

    A bridge between two namespaces is not used, because the firewall rules of Docker drop its packets.
    """
    name, outer, inner = "unfog1", "unfog-out1", "unfog-in1"
    ip("netns", "add", name)
    try:
        ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        ip("address", "add", f"{ADDRESSES[0]}/24", "dev", outer)
        ip("link", "set", outer, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "address", "add", f"{ADDRESSES[1]}/24", "dev", inner)
        ip("-n", name, "link", "set", inner, "up")
        on_core = ["taskset", "--cpu-list"]
        yield [[*on_core, "0"], ["ip", "netns", "exec", name, *on_core, "1"]]
    finally:
        ip("netns", "delete", name)


def images_per_second(urls: list[str]) -> float:
    """Returns the throughput under a constant load. The clients use these proxies in turn."""
    end = time.monotonic() + SECONDS

    def send(number: int) -> list[float]:
        done = []
        with httpx.Client(base_url=urls[number % len(urls)], timeout=TIMEOUT) as client:
            while time.monotonic() < end:
                assert client.post("/generate", json=BODY).status_code == 200
                done.append(time.monotonic())
        return done

    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [at for times in pool.map(send, range(CLIENTS)) for at in times]
    return BODY["count"] * len(done) / (max(done) - start)


def test_two_nodes_have_almost_twice_the_throughput_of_one(launchers: list[list[str]]) -> None:
    cluster = RayCluster(SHIPPED, num_cpus=1, address=ADDRESSES[0], launcher=launchers[0])
    try:
        urls = [cluster.url, cluster.add_node(1, ADDRESSES[1], launchers[1])]
        throughput = {1: list[float](), 2: list[float]()}
        for _ in range(REPEATS):
            for replicas in (1, 2):
                cluster.deploy(replicas)
                cluster.wait_until_running(replicas)
                throughput[replicas].append(images_per_second(urls[:replicas]))  # a node without a replica has no proxy
                print(f"{replicas} replicas: {throughput[replicas][-1]:.2f} images/s", flush=True)
        assert {each["node_ip"] for each in cluster.replicas()} == set(ADDRESSES)
        ratios = [two / one for one, two in zip(*throughput.values(), strict=True)]
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        assert statistics.median(ratios) >= 1.8
    finally:
        cluster.stop()
