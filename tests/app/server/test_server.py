import asyncio
import gc
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
def test_error_for_an_invalid_host_is_one_line(host: str) -> None:
    with pytest.raises(StartError) as caught:
        bind(host, 0)
    assert len(str(caught.value).splitlines()) == 1
    assert host in str(caught.value)


def test_error_for_a_port_in_use_has_the_reason() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(StartError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_ipv6_address_can_be_bound() -> None:
    with bind("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_nagle_algorithm_is_disabled_on_accepted_connections(host: str) -> None:
    with bind(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class Drain:
    """Runs a service in this process, and sends SIGTERM while it encodes an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoding, self.may_finish = threading.Event(), threading.Event()

        def encode(*args: object) -> bytes:
            self.encoding.set()
            assert self.may_finish.wait(WAIT_SECONDS)
            return b"encoded"

        monkeypatch.setattr("app.api.native.answers.encode_sheet", encode)
        monkeypatch.setattr("app.server.server.LAST_ANSWERS_SECONDS", 0)

    def run(self, drain_timeout: float, after_sigterm: Callable[[], None]) -> tuple[httpx.Response, Metrics]:
        """Requests a PNG, sends SIGTERM while it is encoded, and calls `after_sigterm`. Returns the answer."""
        settings = Settings(drain_timeout=drain_timeout)
        app = create_app(settings, FakeRunner)
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]

        async def main() -> httpx.Response:
            serving = asyncio.ensure_future(serve(app, settings, listener))
            await asyncio.wrap_future(app.state.service.engine.ready)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS) as client:
                body, accept = {"digit": 1, "num_steps": 1, "count": 5, "scale": 16}, {"accept": "image/png"}
                request = asyncio.ensure_future(client.post("/generate", json=body, headers=accept))
                await asyncio.to_thread(self.encoding.wait, WAIT_SECONDS)
                os.kill(os.getpid(), signal.SIGTERM)
                while (await client.get("/readyz")).status_code != 503:
                    pass
                after_sigterm()
                answer = await request
            self.may_finish.set()
            await serving
            return answer

        return asyncio.run(main()), app.state.service.metrics


def test_drain_waits_for_an_answer_that_is_being_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drain = Drain(monkeypatch)
    answer, _ = drain.run(WAIT_SECONDS, after_sigterm=drain.may_finish.set)
    assert (answer.status_code, answer.content) == (200, b"encoded")


def test_unfinished_answer_is_503_draining_after_the_drain_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, metrics = Drain(monkeypatch).run(1, after_sigterm=lambda: None)
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert 'unfog_requests_total{code="503",route="/generate"} 1.0' in metrics.render().decode()
    assert 'unfog_rejected_total{reason="draining"} 1.0' in metrics.render().decode()


def test_objects_of_a_ready_service_are_exempt_from_garbage_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.unfreeze()
    drain = Drain(monkeypatch)
    drain.run(WAIT_SECONDS, after_sigterm=drain.may_finish.set)
    try:
        assert gc.get_freeze_count() > len(gc.get_objects())
    finally:
        gc.unfreeze()


def test_viewers_of_the_batch_do_not_delay_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is larger than the kernel buffers for a client that does not read."""
    event = b"event: batch\ndata: " + b" " * 2**25 + b"\n\n"
    monkeypatch.setattr("app.api.native.batch.encode_batch", lambda batch: event)
    monkeypatch.setattr("app.server.server.LAST_ANSWERS_SECONDS", 100 * WAIT_SECONDS)
    settings = Settings()
    app = create_app(settings, FakeRunner)
    listener = bind("127.0.0.1", 0)
    host, port = listener.getsockname()

    async def main() -> bytes:
        serving = asyncio.ensure_future(serve(app, settings, listener))
        await asyncio.wrap_future(app.state.service.engine.ready)
        (unread, unread_writer), (reader, writer) = [await asyncio.open_connection(host, port) for _ in range(2)]
        for each in (unread_writer, writer):
            each.write(b"GET /events/batch HTTP/1.1\r\nHost: x\r\n\r\n")
        await unread.readuntil(b"event: batch")
        received = b""
        while len(received) < 2**25:
            received += await reader.read(2**20)
        os.kill(os.getpid(), signal.SIGTERM)
        received += await reader.read()
        await serving
        unread_writer.close()
        writer.close()
        return received

    async def limited() -> bytes:
        async with asyncio.timeout(WAIT_SECONDS):
            return await main()

    received = asyncio.run(limited())
    assert b"event: error" in received
    assert b'"draining"' in received.rpartition(b"event: error")[2]


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
def test_url_has_the_address_of_the_listener(host: str, url: str) -> None:
    with bind(host, 0) as listener:
        assert _url(listener) == f"{url}{listener.getsockname()[1]}"


@pytest.mark.parametrize("startup", [exit_from_startup, return_from_startup])
def test_failing_lifespan_raises_start_error(monkeypatch: pytest.MonkeyPatch, startup: Callable[..., object]) -> None:
    """Newer releases of uvicorn exit in this case, older ones return."""
    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    with pytest.raises(StartError, match=r"^the application failed to start, see the log$"):
        run_service()


def test_uvicorn_error_before_startup_raises_start_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uvicorn.Config, "load", fail)
    with pytest.raises(StartError, match=r"^the HTTP server failed to start, see the log$"):
        run_service()
    assert "a detail" in caplog.text


def test_unexpected_end_of_uvicorn_raises_given_up_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(server: uvicorn.Server) -> None:
        return None

    monkeypatch.setattr(uvicorn.Server, "main_loop", end)
    with pytest.raises(GivenUpError, match="The HTTP server stopped unexpectedly"):
        run_service()


@pytest.mark.parametrize(("soft", "hard", "allowed"), [(256, 1024, 1024), (256, 256, 256), (1024, None, None)])
def test_limit_of_open_files_is_raised_to_the_hard_limit(soft: int, hard: int | None, allowed: int | None) -> None:
    """Runs in a child process. `hard` None is the hard limit of this machine, which may be below MAX_DESCRIPTORS."""
    granted = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    maximum = MAX_DESCRIPTORS if granted == resource.RLIM_INFINITY else min(granted, MAX_DESCRIPTORS)
    program = f"""
import resource
from app.server.server import allow_connections
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {granted if hard is None else hard}))
allow_connections()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (maximum if allowed is None else allowed)
