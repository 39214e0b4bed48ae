"""Accessibility: axe-core in every view, light and dark, on a desktop and a phone; keyboard and reduced motion."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.e2e.browser.conftest import DESKTOP, PHONE, Open
from tests.e2e.browser.views import generate, wait_until_finished
from tests.e2e.service import Service


def prepare(page: Page, view: str) -> None:
    """Opens a view and shows all of its elements."""
    if view == "generate":
        generate(page, digit="3", count="4", num_steps="6", seed="1")
        wait_until_finished(page)
    elif view == "generate/detail":
        prepare(page, "generate")
        page.locator("#generate-stage button.tile").first.click()
        expect(page.locator("#detail")).to_be_visible()
    elif view == "understand":
        for name in ("#decided-run", "#guidance-run", "#steps-run"):
            expect(page.locator(name)).to_be_enabled()
            page.locator(name).click()
        for name in ("#decided-run", "#guidance-run", "#steps-run"):
            expect(page.locator(name)).to_be_enabled()
    elif view.startswith("draw"):
        page.locator("#pad-digits").get_by_role("button", name="Digit 5").click()
        for tab in ("Remove noise", "Fill in", "Redraw"):
            if view.endswith(tab):
                page.get_by_role("tab", name=tab).click()
    elif view == "status":
        expect(page.locator("#model-cards .facts").first).to_be_visible()


VIEWS = [
    "generate",
    "generate/detail",
    "understand",
    "draw",
    "draw/Remove noise",
    "draw/Fill in",
    "draw/Redraw",
    "batch",
    "status",
]


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_violation_in_light_and_dark(service: Service, open_page: Open, view: str) -> None:
    # Without transitions: axe would measure the contrast of colours that are changing.
    page = open_page(service, f"#/{view.partition('/')[0]}", reduced_motion="reduce")
    prepare(page, view)
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
    generate(page, digit="3", count="2", num_steps="20", seed="1")
    wait_until_finished(page)
    assert page.evaluate("getComputedStyle(document.querySelector('#generate-button')).transitionDuration") == "0s"
