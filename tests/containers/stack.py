"""The compose project as an operator starts it, under a name, tags and ports of its own."""

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
STAND_IN = Path(__file__).parent / "grafana"
PATIENCE = 180  # seconds after which something that should happen does not; never a measure of speed
PULL_PATIENCE = 600
BUILD_PATIENCE = 3600  # a build downloads PyTorch where no wheel is given
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PORTS = {"unfog": "UNFOG_PORT", "prometheus": "UNFOG_PROMETHEUS_PORT", "grafana": "UNFOG_GRAFANA_PORT"}


def docker(*arguments: str, environment: dict[str, str] | None = None, patience: float = PATIENCE) -> str:
    """What the command prints; AssertionError with what it said where it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UNFOG_", "COMPOSE_"))}
    command = ("docker", *arguments)
    done = subprocess.run(
        command, env=clean | (environment or {}), cwd=ROOT, capture_output=True, text=True, timeout=patience
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def has_image(name: str) -> bool:
    """Whether it is on this machine."""
    return bool(docker("image", "ls", "--quiet", name).strip())


def eventually(look: Callable[[], Any], what: str) -> Any:
    """What `look` sees, once that is something; a service that is not there yet is nothing."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if seen := look():
                return seen
            last = seen
        except httpx.TransportError as error:
            last = error
        assert time.monotonic() < deadline, f"still not so: {what} ({last!r})"
        time.sleep(0.5)


def free_ports(number: int) -> list[int]:
    """Ports that nobody has, and that are free again."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Stack:
    """docker-compose.yml and docker-compose.cpu.yml, with no `.env` but the one that is made here."""

    def __init__(self, folder: Path, wheels: Path | None) -> None:
        self.name = f"unfog-test-{os.getpid()}"
        self.tag = f"test-{os.getpid()}"
        self.image = f"unfog:{self.tag}"
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {"UNFOG_TAG": self.tag, **{PORTS[name]: str(port) for name, port in self.ports.items()}}
        self.files = ["docker-compose.yml", "docker-compose.cpu.yml"]
        if wheels:
            build = {"build": {"additional_contexts": {"wheels": str(wheels.resolve())}}}
            override = {"services": {"unfog": build, "train": build}}
            self.files.append(str(folder / "wheels.yml"))
            (folder / "wheels.yml").write_text(yaml.safe_dump(override))
        else:
            self.environment["UNFOG_TORCH_INDEX"] = CPU_INDEX
        self._empty = folder / "no.env"
        self._empty.touch()
        self.stand_in = False  # whether Grafana is one

    def compose(self, *arguments: str, patience: float = PATIENCE) -> str:
        """`docker compose` with these files."""
        files = [word for file in self.files for word in ("--file", file)]
        options = ("--project-name", self.name, "--env-file", str(self._empty), *files)
        return docker("compose", *options, *arguments, environment=self.environment, patience=patience)

    def build(self) -> None:
        """The service's image, and a Grafana: the real one where it can be had."""
        self.compose("build", "unfog", patience=BUILD_PATIENCE)
        grafana = self.config()["services"]["grafana"]["image"]
        if has_image(grafana):
            return
        try:
            docker("pull", "--quiet", grafana, patience=PULL_PATIENCE)
        except (AssertionError, subprocess.TimeoutExpired):
            docker("build", "--tag", grafana, str(STAND_IN), patience=BUILD_PATIENCE)
            self.stand_in = True

    def up(self) -> None:
        """All services, healthy."""
        self.compose("up", "--detach", "--wait", "--wait-timeout", str(PATIENCE), "--no-build", patience=2 * PATIENCE)

    def down(self) -> None:
        """As an operator takes it away, volumes and all."""
        self.compose("--profile", "train", "down", "--volumes", "--remove-orphans", "--timeout", "10")

    def remove(self) -> None:
        """Leaves nothing behind, whatever state it is in."""
        try:
            self.down()
        finally:
            images = [self.image, f"unfog-train:{self.tag}"]
            if self.stand_in:
                images.append(self.config()["services"]["grafana"]["image"])
            for image in images:
                if has_image(image):
                    docker("image", "rm", "--force", image)

    def config(self) -> Any:
        """All files as compose understands them."""
        return json.loads(self.compose("config", "--format", "json"))

    def left(self) -> dict[str, list[str]]:
        """What there is of this project, by kind."""
        label = f"label=com.docker.compose.project={self.name}"
        listings = {"container": ("--all",), "network": (), "volume": ()}
        return {
            kind: docker(kind, "ls", "--quiet", *options, "--filter", label).split()
            for kind, options in listings.items()
        }

    def container(self, service: str) -> Any:
        """All that Docker says of a service's container."""
        (name,) = self.compose("ps", "--all", "--quiet", service).split()
        return json.loads(docker("container", "inspect", name))[0]

    def status_of(self, service: str) -> dict[str, str]:
        """/proc/PID/status of its first process, by name."""
        lines = self.compose("exec", "-T", service, "cat", "/proc/1/status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def url(self, service: str, path: str) -> str:
        """Where it is published."""
        return f"http://127.0.0.1:{self.ports[service]}{path}"

    def get(self, service: str, path: str, **options: Any) -> httpx.Response:
        """An answer that may be anything."""
        return httpx.get(self.url(service, path), timeout=PATIENCE, **options)

    def query(self, expression: str) -> list[Any]:
        """What Prometheus makes of it, by its own API."""
        answer = self.get("prometheus", "/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"]["result"])

    def value(self, expression: str) -> float:
        """Of one series; 0 where there is none yet."""
        return float((self.query(expression) or [{"value": (0, "0")}])[0]["value"][1])
