"""Runs the application within the test process and calls it without a socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner

WORK = {"digit": 3, "num_steps": 3, "seed": 1}


@asynccontextmanager
async def client_of(runner: FakeRunner, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Starts an application with this runner and yields a client when it is ready."""
    app = create_app(Settings(**settings), lambda: runner)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        await asyncio.wrap_future(app.state.service.engine.ready)
        yield client


def run(check: Callable[[httpx.AsyncClient], Awaitable[None]], runner: FakeRunner, **settings: Any) -> None:
    async def main() -> None:
        async with client_of(runner, **settings) as client:
            await check(client)

    asyncio.run(main())
