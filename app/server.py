"""Runs the application under uvicorn, with signals of our own: on SIGTERM we keep answering until all is answered."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from app import errors
from app.config import Settings
from app.device import RunnerError
from app.network import ModelInfo
from app.protocol import patient
from app.service import Service
from app.state import RESTART_SECONDS
from app.trajectory import DEFAULT_MODEL
from app.watchdog import Watchdog

log = logging.getLogger("unfog")

LAST_ANSWERS_SECONDS = 5  # for what is still to be said when the drain's time is over
BACKLOG = 2048
MOST_DESCRIPTORS = 65_536


class StartError(Exception):
    """The service cannot start; one sentence."""


class GivenUpError(Exception):
    """The engine has failed, or was stuck for too long: only another process can help; one sentence."""


class _Uvicorn(uvicorn.Server):
    """uvicorn would close its listener at SIGTERM; we tell it when to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()  # told to stop before it, uvicorn would leave the lifespan to be cancelled

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to answer, and says so."""
        try:
            await super().startup(sockets)
        finally:
            self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals alone."""
        yield


def allow_connections() -> None:
    """As many descriptors as the system grants, up to MOST_DESCRIPTORS: by default a process has 1024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded; StartError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no host has such a name
        number = getattr(error, "errno", None) or 0  # create_server adds the address to the text, in Python's words
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise StartError(f"cannot listen on {host}:{port} (UNFOG_HOST, UNFOG_PORT): {reason}") from error
    # asyncio does so only for sockets that it made: else an answer's body waits 40 ms for its head to be acknowledged
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then drains.

    StartError if the engine cannot start, GivenUpError if it is lost later.
    """
    service: Service = app.state.service
    engine = service.engine
    server = _Uvicorn(_config(app, settings))
    stop, hurry = _signals()
    hurry.add_done_callback(lambda _: setattr(server, "force_exit", True))
    serving = asyncio.ensure_future(server.serve([listener]))
    ready = asyncio.wrap_future(engine.ready)
    await server.up.wait()
    await asyncio.wait((serving, stop, ready), return_when=asyncio.FIRST_COMPLETED)
    watchdog = Watchdog(engine, settings.give_up_seconds)
    if ready.done() and not ready.exception():
        _announce(engine.models[DEFAULT_MODEL], listener, len(settings.api_keys))
        watchdog.start()
        await asyncio.wait((serving, stop, watchdog.lost), return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        await _drain(service, settings.drain_timeout, hurry)
    engine.give_up(errors.EngineFailed(RESTART_SECONDS))
    server.should_exit = True
    await serving
    if watchdog.lost.done() and not stop.done():
        raise GivenUpError(f"the engine was lost for {settings.give_up_seconds:g} s: this process ends for another")
    if ready.done() and (failure := ready.exception()):
        known = isinstance(failure, RunnerError)
        raise StartError(str(failure) if known else "the engine failed while it was loading, see the log")


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    service: Service = app.state.service
    return uvicorn.Config(
        app,
        http=patient(settings, service.metrics),
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=",".join(settings.trusted_proxies),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )


def _announce(info: ModelInfo, listener: socket.socket, num_keys: int) -> None:
    host, port = listener.getsockname()[:2]
    how = "compiled" if info.compiled else "not compiled"
    who = f"for who has one of {num_keys} keys" if num_keys else "for everybody"
    log.info("ready on http://%s:%d, %s on %s, %s, %s", host, port, info.dtype, info.device, how, who)


def _signals() -> tuple["asyncio.Future[None]", "asyncio.Future[None]"]:
    """Done at the first SIGTERM or SIGINT, which drains, and at the second, which waits for nobody."""
    loop = asyncio.get_running_loop()
    futures: tuple[asyncio.Future[None], asyncio.Future[None]] = (loop.create_future(), loop.create_future())

    def on_signal() -> None:
        waiting = [future for future in futures if not future.done()]
        if waiting:
            waiting[0].set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return futures


async def _drain(service: Service, seconds: float, hurry: "asyncio.Future[None]") -> None:
    """Waits until every job is done and its answer sent, at most so long; then whoever still waits is told."""
    engine = service.engine
    log.info("draining: %d images left", engine.waiting + engine.running)
    drained = asyncio.gather(asyncio.wrap_future(engine.drain()), service.owed.none())
    drained.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks
    await asyncio.wait((drained, hurry), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if left := engine.waiting + engine.running:
        log.warning("gave up %d images", left)
    engine.give_up(errors.Draining(1))
    drained.cancel()
