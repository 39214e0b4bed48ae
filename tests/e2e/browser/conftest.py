"""Fixtures: a headless Chromium and pages in it.

A test fails if its page logs an error or sends a request to another origin.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.e2e.service import Service

# The first one has no code for windows. The tests take 28% less time with it.
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
# Without an address, opening the page starts a run of four images.
FIRST_VISIT, ONE_IMAGE = "", "#/generate?count=1"
WAIT_MS = 60_000  # time limit for an expected change; not a performance limit
expect.set_options(timeout=WAIT_MS)


@dataclass
class Watched:
    """What a page has reported. `expected` are parts of console messages that the test causes."""

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def unexpected(self) -> list[str]:
        return [text for text in self.errors if not any(part in text for part in self.expected)]


Open = Callable[..., Page]


def program() -> str | None:
    """Returns the path of the installed browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def arguments() -> list[str]:
    return ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Starts Chromium once for each file. Playwright's event loop must not stay in the process for other tests."""
    if not program():
        pytest.skip(f"needs a browser: {', '.join(PROGRAMS)}")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program(), args=arguments())
        yield started
        started.close()


@contextmanager
def page_of(context: BrowserContext, url: str, watched: Watched) -> Iterator[Page]:
    """Opens a page. Afterwards fails for console errors, uncaught errors, and requests to another origin."""
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            watched.errors.append(f"{message.text} {message.location.get('url', '')}")

    def on_request(request: Request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            watched.foreign.append(request.url)

    page.on("console", on_console)
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("request", on_request)
    yield page
    page.close()
    assert watched.unexpected() == []
    assert watched.foreign == []


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def open_page(browser: Browser, watched: Watched) -> Iterator[Open]:
    """Returns a function that opens a view of a service in a new browser context.

    `prepare(page)` is called before the page loads anything. It can route requests.
    """
    opened: list[Any] = []

    def open_view(
        service: Service, hash_: str = ONE_IMAGE, prepare: Callable[[Page], object] = lambda page: None, **options: Any
    ) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
        context.set_default_timeout(WAIT_MS)
        manager = page_of(context, service.url, watched)
        page = manager.__enter__()
        opened.append((manager, context))
        prepare(page)
        page.goto(f"{service.url}/{hash_}")
        return page

    yield open_view
    for manager, context in opened:
        manager.__exit__(None, None, None)
        context.close()
