"""API keys: the page asks for one, keeps it in session storage only, and says if it is refused."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.e2e.browser.clip import stub
from tests.e2e.browser.conftest import Open, Watched
from tests.e2e.browser.views import choose_more, generate, predictions, wait_until_finished
from tests.e2e.conftest import start_service
from tests.e2e.service import Service

KEY = "the-key-of-this-test"


@pytest.fixture(scope="module")
def locked(checkpoint: Path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_API_KEYS=KEY)


def test_key_is_asked_for_once_and_kept_in_the_session_only(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401", "403"]
    page = open_page(locked)
    expect(page.get_by_text("This service accepts only requests with an API key.")).to_be_visible()
    page.locator("#key").fill("a-wrong-key-for-this")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_text("The service refused the key.")).to_be_visible()
    assert page.locator("#key").get_attribute("type") == "password"
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    generate(page, label="3", count="2", num_steps="5", seed="1")
    wait_until_finished(page)
    assert len(predictions(page)) == 2
    page.reload()
    wait_until_finished(page)  # without another question
    assert KEY in page.evaluate("JSON.stringify({...sessionStorage})")
    assert KEY not in page.evaluate("JSON.stringify({...localStorage})")
    assert KEY not in page.url
    assert page.context.cookies() == []


def test_similarities_are_requested_with_the_key(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401"]
    page = open_page(locked, prepare=stub())
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    with page.expect_request("**/score") as request:
        generate(page, label="3", count="1", num_steps="2", seed="1")
    assert request.value.headers["authorization"] == f"Bearer {KEY}"
    expect(page.locator("#generate-stage .explanation")).to_be_visible()


def test_key_with_other_characters_than_ascii_cannot_be_sent(
    locked: Service, open_page: Open, watched: Watched
) -> None:
    watched.expected += ["401"]
    page = open_page(locked)
    page.locator("#key").fill("ключ")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-dialog")).to_be_visible()
    assert page.locator("#key").evaluate("(input) => input.validity.patternMismatch")
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#generate-button")).to_be_enabled()


def test_key_is_not_in_copied_commands(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401"]
    page = open_page(locked, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    generate(page, label="3", count="1", num_steps="5", seed="1")
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").click()
    for name in ("Copy as curl", "Copy as Python"):
        choose_more(page, name, "#detail")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert KEY not in copied
        assert "UNFOG_API_KEY" in copied


def test_axe_finds_no_violation_in_the_dialog_for_the_key(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401"]
    page = open_page(locked)
    expect(page.locator("#key-dialog")).to_be_visible()
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_page_without_a_key_explains_what_is_missing(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401"]
    page = open_page(locked)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="This service needs an API key")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#key-dialog")).to_be_visible()


def test_status_and_health_work_without_a_key(locked: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["401"]
    page = open_page(locked, "#/status")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status-figures")).to_contain_text("cpu")
