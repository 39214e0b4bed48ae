"""Accessibility: axe-core in every view, light and dark, on a desktop and a phone; keyboard and reduced motion."""

import re
from collections.abc import Callable
from functools import partial

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.e2e.browser.conftest import DESKTOP, ONE_IMAGE, PHONE, Open, Watched
from tests.e2e.browser.views import generate, wait_until_compared, wait_until_finished
from tests.e2e.service import Service

BUSY = {"status": 429, "code": "overloaded", "detail": "The queue is full"}


def finish(page: Page) -> None:
    generate(page, label="3", count="4", num_steps="6", seed="1")
    wait_until_finished(page)


def run_without_answer(page: Page) -> None:
    page.route("**/generate*", lambda route: None)
    page.locator("#advanced-button").click()
    page.locator("#generate-button").click()
    expect(page.get_by_text("Sending the request")).to_be_visible()


def fail(page: Page) -> None:
    page.route("**/generate*", lambda route: route.fulfill(status=429, headers={"Retry-After": "60"}, json=BUSY))
    page.locator("#generate-button").click()
    expect(page.locator(".failure")).to_be_visible()


def open_menu(page: Page) -> None:
    finish(page)
    page.locator("#generate-stage summary").click()


def open_detail(page: Page) -> None:
    finish(page)
    page.locator("#generate-stage button.tile").first.click()
    expect(page.locator("#detail")).to_be_visible()


def compare(page: Page) -> None:
    for name in ("#decided-run", "#guidance-run", "#steps-run"):
        expect(page.locator(name)).to_be_enabled()
        page.locator(name).click()
    for name in ("#decided-run", "#guidance-run", "#steps-run"):
        expect(page.locator(name)).to_be_enabled()


def choose(page: Page, tab: str | None = None) -> None:
    page.locator("#pad-digits").get_by_role("button", name="Digit 5").click()
    if tab:
        page.get_by_role("tab", name=tab).click()


def fail_to_open(page: Page) -> None:
    choose(page)
    page.locator("#pad-file").set_input_files({"name": "text.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator(".failure")).to_be_visible()


def send_samples(page: Page) -> None:
    page.get_by_role("button", name="Send sample requests").click()
    wait_until_compared(page)


STATES: dict[str, Callable[[Page], None]] = {  # the view, its state, and how to reach it
    "generate": finish,
    "generate/running": run_without_answer,
    "generate/failed": fail,
    "generate/menu": open_menu,
    "generate/detail": open_detail,
    "understand": compare,
    "draw": choose,
    "draw/failed": fail_to_open,
    "draw/Remove noise": partial(choose, tab="Remove noise"),
    "draw/Fill in": partial(choose, tab="Fill in"),
    "draw/Redraw": partial(choose, tab="Redraw"),
    "batch": send_samples,
    "status": lambda page: expect(page.locator("#model-cards .facts").first).to_be_visible(),
}


@pytest.mark.parametrize("state", STATES)
def test_axe_finds_no_violation_in_light_and_dark(
    service: Service, open_page: Open, watched: Watched, state: str
) -> None:
    watched.expected.append("429")
    # Without transitions: axe would measure the contrast of colours that are changing.
    view = state.partition("/")[0]
    page = open_page(service, ONE_IMAGE if view == "generate" else f"#/{view}", reduced_motion="reduce")
    STATES[state](page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for size in (DESKTOP, PHONE):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            results = Axe().run(page)
            assert results.violations_count == 0, f"{scheme} {size}\n{results.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size


def test_every_view_can_be_reached_by_keyboard(service: Service, open_page: Open) -> None:
    page = open_page(service)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Tab")
    for view in ("Generate", "Understand", "Draw", "Batch", "Status"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name=view)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Status")).to_be_visible()
    assert page.title() == "Status · unfog"


def test_skip_link_moves_the_focus_and_stays_in_the_view(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/status")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    expect(page.get_by_role("heading", name="Status")).to_be_visible()


def test_button_that_starts_work_keeps_the_focus(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand")
    expect(page.locator("#guidance-run")).to_be_enabled()
    page.locator("#guidance-run").press("Enter")
    expect(page.locator("#guidance-run")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Enter")  # does nothing
    expect(page.locator("#guidance-result img")).to_have_count(6)
    expect(page.locator("#guidance-run")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#guidance-run")).to_be_focused()


def test_screen_readers_hear_the_start_the_end_and_problems_of_a_run(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/generate?digit=3&count=2&seed=5&num_steps=100")
    live = page.locator("#live")
    expect(live).to_have_text("Generating 2 images")
    wait_until_finished(page)
    expect(live).to_have_text(re.compile("^2 images finished in"))
    expect(page.get_by_role("button", name="Digit 3, image 2 of 2: details")).to_be_visible()
    page.keyboard.press("8")
    expect(live).to_have_text("Digit 8")
    page.locator("#advanced-button").click()
    page.locator("#seed").fill("x")
    expect(live).to_have_text(re.compile("^The seed must be"))
    page.get_by_role("link", name="Status").click()
    expect(page.get_by_role("heading", name="Status", level=1)).to_be_focused()


def test_theme_button_overrides_the_system_and_is_kept(service: Service, open_page: Open) -> None:
    page = open_page(service)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Switch between light and dark").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark


def test_reduced_motion_generates_the_same_images(service: Service, open_page: Open) -> None:
    page = open_page(service, reduced_motion="reduce")
    generate(page, label="3", count="2", num_steps="20", seed="1")
    wait_until_finished(page)
    assert page.evaluate("getComputedStyle(document.querySelector('#generate-button')).transitionDuration") == "0s"
