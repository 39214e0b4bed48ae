"""The page while the service is stopped, stops during a run, or misses a deadline."""

import re
import signal
import socket
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.e2e.browser.conftest import Open, Watched
from tests.e2e.browser.views import generate, predictions, wait_until_finished
from tests.e2e.conftest import Start

LOST = [
    "ERR_CONNECTION_REFUSED",
    "ERR_CONNECTION_RESET",
    "ERR_EMPTY_RESPONSE",
    "ERR_INCOMPLETE_CHUNKED_ENCODING",
    "503",
]


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_banner_is_shown_until_the_service_answers_again(
    start: Start, open_page: Open, watched: Watched, port: str
) -> None:
    watched.expected += LOST
    service = start(UNFOG_PORT=port)
    page = open_page(service)
    expect(page.locator('input[name="model"]')).to_have_count(1)
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_role("link", name="Status").click()
    expect(page.locator("#status-figures")).to_contain_text("ok")
    assert service.stop() == 0
    expect(page.locator("#banner")).to_contain_text("The service does not answer")
    expect(page.locator("#status-figures")).to_contain_text("no answer")
    assert Axe().run(page).violations_count == 0
    page.get_by_role("link", name="Generate").click()
    generate(page, label="1", count="1", num_steps="4", seed="1")
    expect(page.get_by_role("heading", name="The service does not answer")).to_be_visible()
    back = start(UNFOG_PORT=port)
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    wait_until_finished(page)
    assert predictions(page) == back.images(digit=1, num_steps=4, seed=1)


def test_broken_stream_keeps_the_steps_and_offers_the_same_images(
    start: Start, open_page: Open, watched: Watched, port: str
) -> None:
    watched.expected += LOST
    service = start(UNFOG_PORT=port, UNFOG_REQUEST_TIMEOUT="300", UNFOG_MAX_BATCH="1")
    page = open_page(service)
    generate(page, label="5", count="16", num_steps="100", seed="9")
    expect(page.get_by_text(re.compile(r"Step ([3-9]|\d\d) of 100"))).to_be_visible()
    service.process.signal(signal.SIGKILL)
    expect(page.get_by_role("heading", name="The connection broke")).to_be_visible()
    expect(page.get_by_role("slider", name="Step", exact=True)).to_be_visible()
    back = start(UNFOG_PORT=port, UNFOG_REQUEST_TIMEOUT="300", UNFOG_MAX_BATCH="16")
    page.get_by_role("button", name="Try again").click()
    wait_until_finished(page)
    assert predictions(page) == back.images(digit=5, count=16, seed=9)


def test_changed_model_is_announced(
    start: Start, fast_checkpoint: Path, open_page: Open, watched: Watched, port: str
) -> None:
    watched.expected += LOST
    service = start(UNFOG_PORT=port)
    page = open_page(service)
    expect(page.locator("#generate-button")).to_be_enabled()
    page.wait_for_timeout(500)  # until the first sample of the health
    assert service.stop() == 0
    start(UNFOG_PORT=port, UNFOG_CHECKPOINT=str(fast_checkpoint))
    expect(page.locator("#banner")).to_contain_text("The service has started with another model.")
    page.get_by_role("button", name="Reload the page").click()
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#num-steps")).to_have_attribute("max", "4")


def test_requests_that_are_refused_for_their_rate_are_repeated(start: Start, open_page: Open, watched: Watched) -> None:
    watched.expected.append("429")
    service = start(UNFOG_RATE_LIMIT="4/6 second")
    page = open_page(service, "#/understand", viewport={"width": 1280, "height": 400})
    expect(page.locator("#guidance-run")).to_be_enabled()
    page.locator("#guidance-run").click()
    expect(page.locator("#guidance-run")).to_contain_text("Busy, waiting")
    expect(page.locator("#guidance-result img")).to_have_count(6)
    expect(page.locator("#guidance-run")).to_have_text("Compare")


def test_deadline_is_explained(start: Start, open_page: Open) -> None:
    service = start(UNFOG_REQUEST_TIMEOUT="0.2", UNFOG_MAX_BATCH="1")
    # The address is the request: the image that the page makes by itself would keep the engine busy.
    page = open_page(service, "#/generate?label=5&count=64&num_steps=100&sampler=ddpm&guidance_scale=2&seed=9")
    expect(page.get_by_role("heading", name="The images took too long")).to_be_visible()
