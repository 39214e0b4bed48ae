"""Tests of what a visitor sees without scrolling, in four window sizes, and of what opening the page does."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.browser.conftest import DESKTOP, FIRST_VISIT, PHONE, Open, Watched
from tests.e2e.browser.test_draw import draw_seven, verdict
from tests.e2e.browser.views import predictions, wait_until_compared, wait_until_finished
from tests.e2e.conftest import Start, start_service
from tests.e2e.service import Service

SIZES = [DESKTOP, {"width": 1440, "height": 900}, PHONE, {"width": 360, "height": 640}]
EACH_SIZE = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['width']}x{size['height']}")
MIN_TEXT_PX = 12
SMALL_TEXTS = """(least) => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { parentElement: parent, textContent: text } = walker.currentNode;
    if (!text.trim() || !parent.checkVisibility()) continue;
    const svg = parent.closest("svg");
    const scale = svg ? svg.getScreenCTM().a : 1;
    const size = parseFloat(getComputedStyle(parent).fontSize) * scale;
    if (size < least - 0.01) found.push(`${size} px: ${text.trim()}`);
  }
  return found;
}"""
CUT_OFF = """() => [...document.querySelectorAll("main button, main label, main h1, main h2, nav a, main output")]
  .filter((each) => each.checkVisibility() && !each.closest("[tabindex='0']"))
  .filter((each) => { const box = each.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; })
  .map((each) => each.textContent)"""
COUNT_SOURCES = """
window.sources = [];
new MutationObserver((all) => {
  for (const { target } of all) if (target.matches?.("#generate-stage img")) sources.push(target.src);
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["src"] });
"""


def assert_fits(page: Page) -> None:
    """Asserts that nothing is cut off at the sides, and that no text is too small to read."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(SMALL_TEXTS, MIN_TEXT_PX) == []


def is_inside(page: Page, selector: str) -> bool:
    """Returns True if the first element is completely inside the window."""
    box, size = page.locator(selector).first.bounding_box(), page.viewport_size
    assert box
    assert size
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size["width"] and bottom <= size["height"]


@pytest.fixture(scope="module")
def slow(checkpoint: Path) -> Iterator[Service]:
    """A service whose runs take long enough to look at them."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="1", UNFOG_REQUEST_TIMEOUT="300")


@EACH_SIZE
def test_button_and_first_image_are_inside_the_window(slow: Service, open_page: Open, size: dict[str, Any]) -> None:
    page = open_page(slow, FIRST_VISIT, viewport=size)
    expect(page.get_by_text(re.compile(r"^Step \d+ of 100"))).to_be_visible()
    running = ("#label-keys", "#generate-button", "progress", ".run-line button", "div.tile", "button.tile")
    for selector in running:
        assert is_inside(page, selector), selector
    assert_fits(page)
    wait_until_finished(page)
    for selector in ("#generate-button", "#generate-stage button.tile"):
        assert is_inside(page, selector), selector
    assert_fits(page)


@pytest.mark.parametrize("size", [DESKTOP, SIZES[1]], ids=["1280x860", "1440x900"])
def test_desktop_shows_all_images_and_the_buttons_below_them(
    service: Service, open_page: Open, size: dict[str, Any]
) -> None:
    page = open_page(service, FIRST_VISIT, viewport=size)
    wait_until_finished(page)
    for selector in ("#generate-stage button.tile >> nth=3", "#generate-stage input", "#generate-stage summary"):
        assert is_inside(page, selector), selector


@pytest.mark.parametrize("view", ["generate", "understand", "draw", "batch", "status"])
def test_view_is_not_cut_off_and_its_text_can_be_read_in_any_size(service: Service, open_page: Open, view: str) -> None:
    page = open_page(service, f"#/{view}")
    if view == "generate":
        expect(page.locator("#advanced")).to_be_hidden()
        page.locator("#advanced-button").click()
        wait_until_finished(page)
    if view == "understand":
        expect(page.locator("#guidance-run")).to_be_enabled()
        page.locator("#guidance-run").click()
        expect(page.locator("#guidance-result img")).to_have_count(6)
    if view == "draw":
        expect(page.locator("#pad-digits button")).to_have_count(10)
    if view == "batch":
        page.get_by_role("button", name="Send sample requests").click()
        wait_until_compared(page)
    if view == "status":
        expect(page.locator("#model-cards .facts").first).to_be_visible()
    for size in [*SIZES, {"width": 844, "height": 390}]:  # the last one is a phone that was turned
        page.set_viewport_size(size)  # type: ignore[arg-type]
        page.wait_for_timeout(100)  # charts are drawn again in the new width
        assert_fits(page)


@EACH_SIZE
def test_answer_is_inside_the_window_after_a_stroke(service: Service, open_page: Open, size: dict[str, Any]) -> None:
    page = open_page(service, "#/draw", viewport=size)
    page.route("**/recognize", lambda route: route.fulfill(json=RECOGNISED))
    expect(page.get_by_text("Draw here")).to_be_visible()
    draw_seven(page)
    expect(verdict(page)).to_have_text("7")
    expect(page.get_by_text("Draw here")).to_be_hidden()
    assert page.evaluate("scrollY") == 0
    assert is_inside(page, ".verdict strong")


RECOGNISED = {
    "label": "7",
    "digit": 7,
    "is_digit": True,
    "probabilities": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    "evaluations": 20,
    "timing": {"denoise_seconds": 0.1},
}


def test_opening_the_page_generates_once_and_adds_nothing_to_the_history(service: Service, open_page: Open) -> None:
    before = service.metrics().value("images_total", digit="7")
    page = open_page(service, FIRST_VISIT)
    wait_until_finished(page)
    assert len(set(predictions(page))) == 4
    expect(page.locator("#history")).to_be_hidden()
    assert page.evaluate("history.length") == 2  # about:blank and the page
    images = predictions(page)
    page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Generate").click()
    assert predictions(page) == images
    assert page.url == f"{service.url}/#/generate"
    assert service.metrics().value("images_total", digit="7") == before + 4


def test_digit_in_the_address_is_generated_at_once(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/generate?digit=3&num_steps=5")
    wait_until_finished(page)
    expect(page.locator("#generate-stage")).to_contain_text("5 / 5")
    page.locator("#generate-stage button.tile").first.click()
    expect(page.locator("#detail .facts")).to_contain_text("Digit3")


def test_reduced_motion_shows_only_the_finished_images(slow: Service, open_page: Open) -> None:
    page = open_page(
        slow, FIRST_VISIT, prepare=lambda page: page.add_init_script(COUNT_SOURCES), reduced_motion="reduce"
    )
    expect(page.locator("#generate-stage progress")).to_be_visible()
    expect(page.locator("#generate-stage .pane").first).to_be_hidden()
    wait_until_finished(page)
    expect(page.locator("#generate-stage img[src]")).to_have_count(8)  # four images in each pane
    assert page.evaluate("sources.length") == 8
    page.get_by_role("slider", name="Step", exact=True).press("Home")
    assert page.evaluate("sources.length") > 8


@pytest.mark.parametrize(("kind", "previews"), [("3g", 10), ("slow-2g", 10), ("4g", 100)])
def test_slow_network_gets_fewer_previews(service: Service, open_page: Open, kind: str, previews: int) -> None:
    script = f"Object.defineProperty(navigator, 'connection', {{value: {{effectiveType: '{kind}'}}}})"
    paths: list[str] = []

    def prepare(page: Page) -> None:
        page.add_init_script(script)
        page.on("request", lambda request: paths.append(request.url.removeprefix(service.url)))

    wait_until_finished(open_page(service, FIRST_VISIT, prepare=prepare))
    assert f"/generate?previews={previews}&include=x_t" in paths


def test_first_run_does_not_take_the_focus(slow: Service, open_page: Open) -> None:
    page = open_page(slow, FIRST_VISIT)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    assert page.evaluate("document.activeElement === document.body")
    wait_until_finished(page)
    assert page.evaluate("document.activeElement === document.body")


def test_focus_moves_from_cancel_to_the_button_that_replaces_it(slow: Service, open_page: Open) -> None:
    page = open_page(slow, FIRST_VISIT)
    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Run again")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()


@pytest.mark.slow
def test_refused_first_run_counts_down_and_leaves_the_form_usable(
    start: Start, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("429")
    page = open_page(start(UNFOG_RATE_LIMIT="1/4 second"), FIRST_VISIT)
    expect(page.get_by_role("heading", name="Too many requests")).to_be_visible()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    expect(page.get_by_role("timer")).to_have_text("You can try again now.")
    page.get_by_role("button", name="Try again").click()
    wait_until_finished(page)
