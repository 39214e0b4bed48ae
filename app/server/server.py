"""Runs the application under uvicorn, with signal handling that lets admitted requests finish after SIGTERM.

Drain: after the first SIGTERM or SIGINT the service still listens. New requests are answered with 503, and admitted
requests are finished. The drain ends when all answers are sent, after `UNFOG_DRAIN_TIMEOUT`, or at the second signal.
Unfinished requests are then answered with 503, and the process exits with status 0.

uvicorn would close the listening socket at SIGTERM instead. Probes would then fail to connect, and clients would get
connection errors instead of a 503 with Retry-After.
"""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from app import errors
from app.api.service import Service
from app.engine.engine import RESTART_SECONDS, Engine
from app.engine.interface import RunnerError
from app.engine.watchdog import Watchdog
from app.server.connection import connection_class
from app.settings import Settings

log = logging.getLogger("unfog")

LAST_ANSWERS_SECONDS = 5  # time for sending the remaining answers after the drain
BACKLOG = 2048  # connections that the operating system queues before they are accepted
MAX_DESCRIPTORS = 65_536
NOT_STARTED = "the application failed to start, see the log"


class StartError(Exception):
    """The service cannot start. The message is one line that the operator sees."""


class GivenUpError(Exception):
    """The service has stopped working, and the process must be restarted. The message is logged."""


class _Uvicorn(uvicorn.Server):
    """A uvicorn server without signal handlers. `startup_ended` is set at the end of its startup."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        # serve() must not stop uvicorn before this event. Otherwise uvicorn cancels the application's lifespan.
        self.startup_ended = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the application and accepts connections. Raises StartError if the application fails to start."""
        try:
            await super().startup(sockets)
        except SystemExit as error:  # Newer releases of uvicorn raise SystemExit, older ones return.
            raise StartError(NOT_STARTED) from error
        finally:
            self.startup_ended.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs no signal handlers, because serve() handles the signals."""
        yield


def allow_connections() -> None:
    """Raises the soft limit of open files to the hard limit, but at most to MAX_DESCRIPTORS.

    Each connection needs one file descriptor, and the soft limit is often only 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """Opens the listening socket. Raises StartError if the address is invalid or in use."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError is raised for an invalid host name.
        # str(error) is not used, because create_server adds the address to it.
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise StartError(f"cannot listen on {host}:{port} (UNFOG_HOST, UNFOG_PORT): {reason}") from error
    # Disables Nagle's algorithm, which delays a body by 40 ms until its head is acknowledged. asyncio disables it only
    # for sockets that it creates itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    """Serves requests until SIGTERM or SIGINT, then drains and returns.

    Raises StartError if the service cannot start. Raises GivenUpError if the engine is lost or the HTTP server stops.
    """
    service: Service = app.state.service
    engine = service.engine
    server, url = _Uvicorn(_config(app, settings)), _url(listener)
    stop, stop_now = _signals()
    stop_now.add_done_callback(lambda _: setattr(server, "force_exit", True))
    serving = asyncio.ensure_future(server.serve([listener]))
    await _wait_for_startup(server, serving)
    ready = asyncio.wrap_future(engine.ready)
    await asyncio.wait((serving, stop, ready), return_when=asyncio.FIRST_COMPLETED)
    watchdog = Watchdog(engine, settings.give_up_seconds)
    if ready.done() and not ready.exception():
        exempt_from_collection()
        announce(engine, settings, url=url)
        watchdog.start()
        await asyncio.wait((serving, stop, watchdog.lost), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving
        raise GivenUpError("The HTTP server stopped unexpectedly. Exiting with status 1")
    if stop.done():
        await drain(service, settings.drain_timeout, stop_now)
    service.give_up(errors.EngineFailed(RESTART_SECONDS))
    server.should_exit = True
    await serving
    if watchdog.lost.done() and not stop.done():
        raise GivenUpError(
            f"Engine unresponsive for {settings.give_up_seconds:g} s. "
            "Exiting with status 1 so that the supervisor restarts the process"
        )
    if ready.done() and (failure := ready.exception()):
        known = isinstance(failure, RunnerError)
        raise StartError(str(failure) if known else "the engine failed to start, see the log")


async def _wait_for_startup(server: _Uvicorn, serving: "asyncio.Future[None]") -> None:
    """Waits until the application has started. Raises StartError if the application or uvicorn fails to start."""
    startup_ended = asyncio.ensure_future(server.startup_ended.wait())
    await asyncio.wait((serving, startup_ended), return_when=asyncio.FIRST_COMPLETED)
    startup_ended.cancel()
    if server.started:
        return
    try:
        await serving
    except StartError:
        raise
    except Exception as error:
        log.critical("HTTP server failed to start", exc_info=True)
        raise StartError("the HTTP server failed to start, see the log") from error
    raise StartError(NOT_STARTED)


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    service: Service = app.state.service
    return uvicorn.Config(
        app,
        http=connection_class(settings, service.metrics),
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=",".join(settings.trusted_proxies),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def exempt_from_collection() -> None:
    """Exempts all objects that exist now from garbage collections.

    They are modules, models and routes, which live until the process ends. To visit them takes 0.2 s, in which no other
    thread can run Python code. Under load such a collection occurs every few seconds.
    """
    gc.collect()
    gc.freeze()


def announce(engine: Engine, settings: Settings, **place: str) -> None:
    """Logs that the service is ready. `place` says where it runs."""
    infos = list(engine.models.values())
    facts = {
        **place,
        "models": ", ".join(info.name for info in infos),
        "device": infos[0].device,
        "dtype": infos[0].dtype,
        "compiled": infos[0].compiled,
        "auth": "on" if settings.api_keys else "off",
    }
    log.info("Ready", extra=facts)


def _signals() -> tuple["asyncio.Future[None]", "asyncio.Future[None]"]:
    """Returns two futures. The first one starts the drain, and the second one ends it early.

    The first SIGTERM or SIGINT completes the first future. A second signal completes the second future.
    """
    loop = asyncio.get_running_loop()
    futures: tuple[asyncio.Future[None], asyncio.Future[None]] = (loop.create_future(), loop.create_future())

    def on_signal() -> None:
        waiting = [future for future in futures if not future.done()]
        if waiting:
            waiting[0].set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return futures


async def drain(service: Service, seconds: float, stop_now: "asyncio.Future[None] | None" = None) -> None:
    """Waits until all jobs are finished and all answers are sent, but at most `seconds` or until `stop_now`.

    Then answers all remaining jobs with 503.
    """
    engine = service.engine
    log.info("Draining", extra={"images": sum(engine.count_images())})
    drained = asyncio.gather(asyncio.wrap_future(engine.drain()), service.in_flight.none())
    drained.add_done_callback(lambda done: done.cancelled() or done.exception())  # Marks the exception as retrieved.
    ends = (drained, stop_now) if stop_now else (drained,)
    await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if left := sum(engine.count_images()):
        log.warning("Drain ended, dropped unfinished images", extra={"count": left})
    service.give_up(errors.Draining(1))
    drained.cancel()
