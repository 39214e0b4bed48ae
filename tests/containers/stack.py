"""Runs the compose project for tests, with its own project name, image tags and ports."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
STAND_INS = {  # folders and stages of the images that replace those of other projects
    "grafana": ("grafana", None),
    "haproxy": ("replicas", "haproxy"),
    "postgres": ("replicas", "postgres"),
    "redis": ("replicas", "redis"),
}
PATIENCE = 180  # seconds; a generous timeout, not a measure of speed
PULL_PATIENCE = 600
BUILD_PATIENCE = 3600  # a build downloads PyTorch if no wheel is given
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENT = {"UNFOG_DRAIN_TIMEOUT": "120", "UNFOG_STOP_GRACE_PERIOD": "140s"}  # a slow machine needs more than 25 s
PORTS = {"unfog": "UNFOG_PORT", "prometheus": "UNFOG_PROMETHEUS_PORT", "grafana": "UNFOG_GRAFANA_PORT"}


def docker(*arguments: str, environment: dict[str, str] | None = None, patience: float = PATIENCE) -> str:
    """Runs docker and returns its stdout. Raises AssertionError with its output if it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UNFOG_", "COMPOSE_"))}
    command = ("docker", *arguments)
    done = subprocess.run(
        command, env=clean | (environment or {}), cwd=ROOT, capture_output=True, text=True, timeout=patience
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def has_image(name: str) -> bool:
    """True if the image exists on this machine."""
    return bool(docker("image", "ls", "--quiet", name).strip())


def eventually(look: Callable[[], Any], what: str) -> Any:
    """Calls `look` until its result is true, and returns the result. Connection errors count as false.

    `what` describes the condition in the error. Raises AssertionError after PATIENCE seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if seen := look():
                return seen
            last = seen
        except httpx.TransportError as error:
            last = error
        assert time.monotonic() < deadline, f"timeout while waiting for: {what} (last result: {last!r})"
        time.sleep(0.5)


def free_ports(number: int) -> list[int]:
    """Returns different TCP ports of this machine that are not in use."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Stack:
    """The project of docker-compose.yml and docker-compose.cpu.yml, with an empty `.env`."""

    def __init__(self, folder: Path, wheels: Path | None, *files: str) -> None:
        """`files` are further compose files."""
        self.name = f"unfog-test-{os.getpid()}"
        self.tag = f"test-{os.getpid()}"
        self.image = f"unfog:{self.tag}"
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {"UNFOG_TAG": self.tag, **PATIENT}
        self.environment |= {PORTS[name]: str(port) for name, port in self.ports.items()}
        self.files = ["docker-compose.yml", "docker-compose.cpu.yml", *files]
        if wheels:
            build = {"build": {"additional_contexts": {"wheels": str(wheels.resolve())}}}
            override = {"services": {"unfog": build, "train": build}}
            self.files.append(str(folder / "wheels.yml"))
            (folder / "wheels.yml").write_text(yaml.safe_dump(override))
        else:
            self.environment["UNFOG_TORCH_INDEX"] = CPU_INDEX
        self._empty = folder / "no.env"
        self._empty.touch()
        self.stand_ins: dict[str, str] = {}  # the replaced images, by service

    def compose(self, *arguments: str, patience: float = PATIENCE) -> str:
        """Runs `docker compose` with the files of this project and returns its stdout."""
        files = [word for file in self.files for word in ("--file", file)]
        options = ("--project-name", self.name, "--env-file", str(self._empty), *files)
        return docker("compose", *options, *arguments, environment=self.environment, patience=patience)

    def build(self) -> None:
        """Builds the image of the service. Pulls the other images, or builds a replacement if the pull fails."""
        self.compose("build", "unfog", patience=BUILD_PATIENCE)
        images = {name: service["image"] for name, service in self.config()["services"].items() if name in STAND_INS}
        for name, image in images.items():
            if has_image(image):
                continue
            try:
                docker("pull", "--quiet", image, patience=PULL_PATIENCE)
            except (AssertionError, subprocess.TimeoutExpired):
                folder, stage = STAND_INS[name]
                target = ("--target", stage) if stage else ()
                context = str(Path(__file__).parent / folder)
                docker("build", "--tag", image, *target, context, patience=BUILD_PATIENCE)
                self.stand_ins[name] = image

    def up(self) -> None:
        """Starts all services and waits until they are healthy."""
        self.compose("up", "--detach", "--wait", "--wait-timeout", str(PATIENCE), "--no-build", patience=2 * PATIENCE)

    def down(self) -> None:
        """Removes all containers, networks and volumes of the project."""
        self.compose("--profile", "train", "down", "--volumes", "--remove-orphans", "--timeout", "10")

    def remove(self) -> None:
        """Removes the project and its images, in whatever state it is."""
        try:
            self.down()
        finally:
            images = [self.image, f"unfog-train:{self.tag}", *self.stand_ins.values()]
            for image in images:
                if has_image(image):
                    docker("image", "rm", "--force", image)

    def config(self) -> Any:
        """Returns the merged configuration of all compose files."""
        return json.loads(self.compose("config", "--format", "json"))

    def left(self) -> dict[str, list[str]]:
        """Returns the IDs of the containers, networks and volumes of this project."""
        label = f"label=com.docker.compose.project={self.name}"
        listings = {"container": ("--all",), "network": (), "volume": ()}
        return {
            kind: docker(kind, "ls", "--quiet", *options, "--filter", label).split()
            for kind, options in listings.items()
        }

    def container(self, service: str) -> Any:
        """Returns `docker container inspect` for the container of a service."""
        (container,) = self.containers(service)
        return container

    def containers(self, service: str) -> list[Any]:
        """Returns `docker container inspect` for each container of a service."""
        names = self.compose("ps", "--all", "--quiet", service).split()
        return list(json.loads(docker("container", "inspect", *names)))

    def status_of(self, service: str) -> dict[str, str]:
        """Returns the fields of /proc/1/status in the container of a service."""
        lines = self.compose("exec", "-T", service, "cat", "/proc/1/status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def url(self, service: str, path: str) -> str:
        """Returns the URL of a path on the published port of a service."""
        return f"http://127.0.0.1:{self.ports[service]}{path}"

    def get(self, service: str, path: str, **options: Any) -> httpx.Response:
        """Sends a GET request to a service. Does not check the status."""
        return httpx.get(self.url(service, path), timeout=PATIENCE, **options)

    def query(self, expression: str) -> list[Any]:
        """Evaluates a PromQL expression with Prometheus' HTTP API."""
        answer = self.get("prometheus", "/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"]["result"])

    def value(self, expression: str) -> float:
        """Returns the value of the first series of an expression, or 0 if there is none yet."""
        return float((self.query(expression) or [{"value": (0, "0")}])[0]["value"][1])
