"""Runs HAProxy with deploy/haproxy/haproxy.cfg in front of services on this machine."""

import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.e2e.process import ROOT, TIMEOUT, wait_until

CONFIG = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
TEMPLATE = re.compile(r"^ *server-template replica .*\n", re.MULTILINE)


class HAProxy:
    """A running HAProxy. `url` is that of the service behind it."""

    def __init__(self, program: str, folder: Path, replicas: Sequence[tuple[str, int]]) -> None:
        """`replicas` are the addresses of the services. In a container, HAProxy finds them by Docker's resolver."""
        # HAProxy inherits listening sockets, so that no other process can take their ports in between.
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        service, metrics = (listener.getsockname()[1] for listener in listeners)
        self.url, self._metrics = f"http://127.0.0.1:{service}", f"http://127.0.0.1:{metrics}/metrics"
        servers = "".join(f"    server replica{i} {host}:{port}\n" for i, (host, port) in enumerate(replicas, 1))
        text, count = TEMPLATE.subn(servers, CONFIG.read_text())
        assert count == 2
        for port, listener in zip((8000, 8404), listeners, strict=True):
            assert f"    bind :{port}\n" in text
            text = text.replace(f"    bind :{port}\n", f"    bind fd@{listener.fileno()}\n")
        (folder / CONFIG.name).write_text(text)
        log = (folder / "haproxy.log").open("wb")
        self._process = subprocess.Popen(
            [program, "-W", "-db", "-f", str(folder / CONFIG.name)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno() for listener in listeners],
        )
        for each in (log, *listeners):
            each.close()
        wait_until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, "HAProxy finds a replica")

    def samples(self) -> list[Sample]:
        """Returns the metrics of HAProxy itself."""
        text = httpx.get(self._metrics, timeout=TIMEOUT).text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples of a metric of HAProxy with these labels."""
        return sum(each.value for each in self.samples() if each.name == name and labels.items() <= each.labels.items())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT)
