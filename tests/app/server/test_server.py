import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.metrics import Metrics
from app.server.server import MAX_DESCRIPTORS, GivenUpError, StartError, _url, bind, serve
from app.settings import Settings
from tests.app.fakes import WAIT_SECONDS, FakeRunner

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "256.256.256.256", "no.such.host.invalid"])
def test_a_host_that_nobody_has_is_one_sentence(host: str) -> None:
    with pytest.raises(StartError) as caught:
        bind(host, 0)
    assert len(str(caught.value).splitlines()) == 1
    assert host in str(caught.value)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(StartError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_ipv6_is_a_host_like_any_other() -> None:
    with bind("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_is_not_kept_back_until_its_head_is_acknowledged(host: str) -> None:
    with bind(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class Drain:
    """A service in this process that was told to stop while it encodes an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoding, self.go_on = threading.Event(), threading.Event()

        def encode(*args: object) -> bytes:
            self.encoding.set()
            assert self.go_on.wait(WAIT_SECONDS)
            return b"encoded"

        monkeypatch.setattr("app.api.routes.generate.encode_sheet", encode)
        monkeypatch.setattr("app.server.server.LAST_ANSWERS_SECONDS", 0)

    def run(self, drain_timeout: float, and_then: Callable[[], None]) -> tuple[httpx.Response, Metrics]:
        """Asks for a PNG, sends SIGTERM while it is encoded, does `and_then`; the answer."""
        settings = Settings(drain_timeout=drain_timeout)
        app = create_app(settings, FakeRunner)
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]

        async def main() -> httpx.Response:
            serving = asyncio.ensure_future(serve(app, settings, listener))
            await asyncio.wrap_future(app.state.service.engine.ready)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS) as client:
                body, accept = {"digit": 1, "num_steps": 1, "seed": 1}, {"accept": "image/png"}
                asked = asyncio.ensure_future(client.post("/generate", json=body, headers=accept))
                await asyncio.to_thread(self.encoding.wait, WAIT_SECONDS)
                os.kill(os.getpid(), signal.SIGTERM)
                while (await client.get("/readyz")).status_code != 503:
                    pass
                and_then()
                answer = await asked
            self.go_on.set()
            await serving
            return answer

        return asyncio.run(main()), app.state.service.metrics


def test_an_answer_that_is_still_being_encoded_is_waited_for_as_long_as_the_drain_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drain = Drain(monkeypatch)
    answer, _ = drain.run(WAIT_SECONDS, and_then=drain.go_on.set)
    assert (answer.status_code, answer.content) == (200, b"encoded")


def test_an_answer_that_is_not_ready_when_all_time_is_over_says_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, metrics = Drain(monkeypatch).run(1, and_then=lambda: None)
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert 'unfog_requests_total{code="503",route="/generate"} 1.0' in metrics.render().decode()
    assert 'unfog_rejected_total{reason="draining"} 1.0' in metrics.render().decode()


def run_service() -> None:
    settings = Settings()
    with bind("127.0.0.1", 0) as listener:
        asyncio.run(serve(create_app(settings, FakeRunner), settings, listener))


def fail(*args: object) -> None:
    raise OSError("a detail")


async def exit_from_startup(server: uvicorn.Server, sockets: object = None) -> None:
    sys.exit(3)


async def return_from_startup(server: uvicorn.Server, sockets: object = None) -> None:
    server.should_exit = True


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_url_of_a_listener_can_be_opened(host: str, url: str) -> None:
    with bind(host, 0) as listener:
        assert _url(listener) == f"{url}{listener.getsockname()[1]}"


@pytest.mark.parametrize("startup", [exit_from_startup, return_from_startup])
def test_lifespan_that_fails_is_a_start_error(monkeypatch: pytest.MonkeyPatch, startup: Callable[..., object]) -> None:
    """Releases of uvicorn differ in what they do then."""
    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    with pytest.raises(StartError, match=r"^the application failed to start, see the log$"):
        run_service()


def test_server_that_fails_before_its_startup_is_a_start_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uvicorn.Config, "load", fail)
    with pytest.raises(StartError, match=r"^the HTTP server failed to start, see the log$"):
        run_service()
    assert "a detail" in caplog.text


def test_server_that_returns_although_nobody_stopped_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(server: uvicorn.Server) -> None:
        return None

    monkeypatch.setattr(uvicorn.Server, "main_loop", end)
    with pytest.raises(GivenUpError, match="The HTTP server stopped unexpectedly"):
        run_service()


@pytest.mark.parametrize(("soft", "hard", "allowed"), [(256, 1024, 1024), (256, 256, 256), (1024, None, None)])
def test_as_many_connections_as_the_system_grants(soft: int, hard: int | None, allowed: int | None) -> None:
    """In a process of its own; None is what this machine grants, which may be less than there is any need for."""
    granted = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MAX_DESCRIPTORS if granted == resource.RLIM_INFINITY else min(granted, MAX_DESCRIPTORS)
    program = f"""
import resource
from app.server.server import allow_connections
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {granted if hard is None else hard}))
allow_connections()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (most if allowed is None else allowed)
