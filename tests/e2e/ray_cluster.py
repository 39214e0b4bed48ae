"""Ray nodes on this machine, and the service on them."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.process import BASE, ROOT, TIMEOUT, wait_until

START_SECONDS = 300
RAY = str(Path(sys.executable).with_name("ray"))


class RayCluster:
    """Runs `ray start` with ports and a folder of its own. `deploy` starts replicas of the service."""

    def __init__(
        self, checkpoint: Path, num_cpus: int = 8, *, address: str = "127.0.0.1", launcher: Sequence[str] = ()
    ) -> None:
        """`num_cpus` is what Ray believes. New replicas that start before old ones stop need CPUs, too.

        `launcher` is a command that runs `ray start`, for example in a network namespace that has this address.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="unfog-ray-"))  # short, because Ray has sockets in it
        self._checkpoint = checkpoint
        self._http_port, dashboard, gcs = _free_ports(3)
        self._head = f"{address}:{gcs}"
        self.url, self._dashboard = f"http://{address}:{self._http_port}", f"http://{address}:{dashboard}"
        head = {
            "--port": gcs,
            "--dashboard-host": address,
            "--dashboard-port": dashboard,
            "--temp-dir": self._folder,
        }
        self._processes = list[subprocess.Popen[bytes]]()
        self._start(launcher, ["--head", "--include-dashboard=true"], head, address, num_cpus)

    def add_node(self, num_cpus: int, address: str, launcher: Sequence[str]) -> str:
        """Starts another node. Returns the URL of its proxy."""
        self._start(launcher, [], {"--address": self._head}, address, num_cpus)
        return f"http://{address}:{self._http_port}"

    def _start(
        self, launcher: Sequence[str], flags: list[str], options: dict[str, Any], address: str, num_cpus: int
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",  # otherwise Ray uses the token of the user, if there is one
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.ray.proxy.middleware",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        options = {**options, "--node-ip-address": address, "--num-cpus": num_cpus}
        self._processes.append(
            subprocess.Popen(
                [*launcher, RAY, "start", "--block", *flags, *(f"{name}={value}" for name, value in options.items())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def deploy(self, num_replicas: int | str, *, variables: dict[str, str] | None = None, **options: Any) -> None:
        """Changes the service to these settings and options of the deployment. `wait_until_running` waits for it."""
        settings = BASE | {"UNFOG_CHECKPOINT": str(self._checkpoint), "UNFOG_DATA_DIR": str(self._folder / "data")}
        deployment = {
            "name": "Replica",
            "num_replicas": num_replicas,
            "ray_actor_options": {"num_cpus": 1},
            "health_check_period_s": 1,
        }
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "0.0.0.0", "port": self._http_port},
            "applications": [
                {
                    "name": "unfog",
                    "route_prefix": "/",
                    "import_path": "app.ray.replica:application",
                    "runtime_env": {"env_vars": settings | (variables or {})},
                    "deployments": [deployment | options],
                }
            ],
        }
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                response = httpx.put(f"{self._dashboard}/api/serve/applications/", json=config, timeout=TIMEOUT)
            except httpx.TransportError:  # The dashboard has not started.
                assert self._processes[0].poll() is None, "ray start failed"
                assert time.monotonic() < deadline
                time.sleep(0.2)
                continue
            assert response.status_code == 200, response.text
            return

    def replicas(self) -> list[dict[str, Any]]:
        """Returns the replicas with their `state`, `pid`, `node_ip` and `replica_id`."""
        applications = httpx.get(f"{self._dashboard}/api/serve/applications/", timeout=TIMEOUT).json()["applications"]
        deployments = applications.get("unfog", {}).get("deployments", {})
        replicas: list[dict[str, Any]] = deployments.get("Replica", {}).get("replicas", [])
        return replicas

    def wait_until_running(self, num_replicas: int, *, without: frozenset[str] = frozenset()) -> None:
        """Waits until exactly these many replicas run and none starts or stops. `without` has ids of old replicas."""

        def is_done() -> bool:
            replicas = self.replicas()
            return (
                len(replicas) == num_replicas
                and all(each["state"] == "RUNNING" for each in replicas)
                and not without & {each["replica_id"] for each in replicas}
            )

        wait_until(is_done, f"{num_replicas} replicas run", timeout=START_SECONDS)

    def process_named(self, name: str) -> psutil.Process:
        """Returns the process of the head node whose name, which Ray changes during a call, begins with this."""
        (found,) = [each for each in _descendants(self._processes[0]) if "".join(each.cmdline()).startswith(name)]
        return found

    def stop(self) -> None:
        """Kills all processes, because Ray takes half a minute to stop replicas."""
        processes = [each for process in self._processes for each in _descendants(process)]
        for each in [*processes, *self._processes]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self._processes:
            process.wait(TIMEOUT)
        psutil.wait_procs(processes, TIMEOUT)
        shutil.rmtree(self._folder, ignore_errors=True)


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_ports(number: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
