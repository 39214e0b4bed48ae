"""Tests of what a user saves or copies: animations, the picture with a caption, links, the dialog and its menu."""

import io
import json
import re

import pytest
from PIL import Image, ImageSequence
from playwright.sync_api import Page, Route, expect

from model.png import Provenance
from tests.e2e.browser.conftest import Open, Watched
from tests.e2e.browser.test_generate import ADDRESS, BODY
from tests.e2e.browser.views import choose_more, predictions, wait_until_finished
from tests.e2e.conftest import Start
from tests.e2e.service import Service, open_png, pngs


@pytest.mark.parametrize(("action", "kind"), [("Save as animation", "gif"), ("Animation as WebP", "webp")])
def test_animation_equals_the_response_of_the_api(service: Service, open_page: Open, action: str, kind: str) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    with page.expect_download() as download:
        if kind == "gif":
            page.get_by_role("button", name=action).click()
        else:
            choose_more(page, action)
    expect(page.get_by_text("Saved.")).to_be_visible()
    assert download.value.suggested_filename == f"digit-4-seed-42.{kind}"
    content = download.value.path().read_bytes()
    body = {**BODY, "scale": 8}  # three images in two columns: 448 pixels
    assert content == service.post(body, f"image/{kind}", "?previews=50").content
    with Image.open(io.BytesIO(content)) as animation:
        assert animation.size == (448, 448)
        assert sum(1 for _ in ImageSequence.Iterator(animation)) == 12  # steps


def test_refused_animation_says_why_and_the_images_stay(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("503")
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.route("**/generate*", lambda route: route.fulfill(status=503, json={"code": "draining", "detail": "Draining"}))
    page.get_by_role("button", name="Save as animation").click()
    expect(page.locator("#generate-stage .run-line [role=status]")).to_contain_text(re.compile("stop"))
    assert len(predictions(page)) == 3


def test_picture_has_all_images_a_caption_and_their_text_chunks(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    with page.expect_download() as download:
        choose_more(page, "Picture with caption")
    content = download.value.path().read_bytes()
    pixels, text, mode = open_png(content)
    assert mode == "RGBA"
    provenance, indices = Provenance.parse(text)
    assert (provenance.labels, provenance.seed, indices) == (("4",), 42, range(3))
    assert pixels.shape[:2] == (896 + 72, 896)
    grey = Image.fromarray(pixels[:896, :, 0])
    for index, png in enumerate(pngs(service.post(BODY))):
        left, top = 448 * (index % 2), 448 * (index // 2)
        tile = grey.crop((left, top, left + 448, top + 448)).resize((28, 28), Image.Resampling.NEAREST)
        assert tile.tobytes() == open_png(png)[0].tobytes()
    assert pixels[896:].max() == 255  # the caption


def test_link_gives_the_same_images_on_a_service_that_names_the_model_differently(
    service: Service, start: Start, open_page: Open
) -> None:
    page = open_page(service, ADDRESS, permissions=["clipboard-read", "clipboard-write"])
    wait_until_finished(page)
    choose_more(page, "Copy link")
    expect(page.get_by_text("Link copied.")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{service.url}/{ADDRESS}&checkpoint=")
    other = start()
    images = predictions(page)
    there = open_page(other, link.removeprefix(f"{service.url}/"))
    wait_until_finished(there)
    assert predictions(there) == images
    expect(there.get_by_role("note")).to_have_count(0)
    renamed = open_page(other, link.removeprefix(f"{service.url}/").replace("model=default", "model=mine"))
    wait_until_finished(renamed)
    assert predictions(renamed) == images


def test_link_to_another_checkpoint_is_explained(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    # The images of the link are shown already, but they are those of this service.
    page.evaluate(f"location.hash = '{ADDRESS}&checkpoint=0123456789ab'")
    expect(page.get_by_role("note")).to_contain_text("This service does not have the model of the link")
    renamed = open_page(service, f"{ADDRESS.replace('model=default', 'model=mine')}&checkpoint=0123456789ab")
    wait_until_finished(renamed)
    expect(renamed.get_by_role("note")).to_contain_text("This service does not have the model of the link")
    assert predictions(renamed) == predictions(page)
    hostile = open_page(service, f"{ADDRESS}&checkpoint=<img>")
    wait_until_finished(hostile)
    expect(hostile.get_by_role("note")).to_have_count(0)


def test_note_about_the_checkpoint_stays_after_an_error(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("503")
    problem = {"status": 503, "code": "starting", "detail": "Starting"}

    def prepare(page: Page) -> None:
        page.route("**/generate?*", lambda route: route.fulfill(status=503, json=problem), times=1)

    page = open_page(service, f"{ADDRESS}&checkpoint=0123456789ab", prepare)
    expect(page.get_by_role("heading", name="The service is starting")).to_be_visible()
    expect(page.get_by_role("note")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    wait_until_finished(page)
    expect(page.get_by_role("note")).to_be_visible()


def test_broken_download_is_explained(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.evaluate(BREAK_BODIES)
    page.get_by_role("button", name="Save as animation").click()
    expect(page.get_by_text("The connection broke.")).to_be_visible()


BREAK_BODIES = "() => { Response.prototype.blob = () => Promise.reject(new TypeError('Failed to fetch')); }"


def test_dialog_has_one_main_action_and_names_the_model(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").first.click()
    dialog = page.locator("#detail")
    expect(dialog.locator("button.primary")).to_have_count(1)
    names = dialog.locator("button, summary").evaluate_all(
        "all => all.filter((each) => each.checkVisibility()).map((each) => each.ariaLabel ?? each.textContent)"
    )
    assert names == ["Previous", "Next", "Close", "Download PNG", "More"]
    expect(dialog.locator(".facts")).to_contain_text("Modeldefault")
    sha256 = json.loads(service.client.get("/health").text)["model"]["sha256"]
    expect(dialog).not_to_contain_text(sha256[:12])


@pytest.mark.parametrize("width", [390, 360, 320])
def test_menus_and_texts_to_copy_fit_a_narrow_window(service: Service, open_page: Open, width: int) -> None:
    def prepare(page: Page) -> None:  # a page without HTTPS has no clipboard
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")

    page = open_page(service, ADDRESS, prepare, viewport={"width": width, "height": 640})
    wait_until_finished(page)
    for root in ("#generate-stage", "#detail"):
        page.locator(f"{root} summary").click()
        box = page.locator(f"{root} .menu div").bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        page.locator(root).get_by_role("button", name="Copy link").click()
        expect(page.locator(root).get_by_role("textbox", name="Link")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if root == "#generate-stage":
            page.locator("#generate-stage button.tile").first.click()
            assert page.evaluate("document.querySelector('#detail').scrollTop") == 0


def test_second_press_while_saving_saves_nothing(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    held: list[Route] = []
    page.route("**/generate?previews=50", lambda route: held.append(route))
    for _ in range(4):
        page.get_by_role("button", name="Save as animation").click()
    with page.expect_download():
        held[0].continue_()
    expect(page.get_by_text("Saved.")).to_be_visible()
    assert len(held) == 1


def test_menu_closes_with_escape_and_when_the_focus_leaves(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").first.click()
    menu, summary = page.locator("#detail .menu"), page.locator("#detail summary")
    summary.focus()
    page.keyboard.press("Enter")
    expect(menu).to_have_attribute("open", "")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Copy link")).to_be_focused()
    page.keyboard.press("Escape")
    expect(menu).not_to_have_attribute("open", "")
    expect(summary).to_be_focused()
    expect(page.locator("#detail")).to_be_visible()
    page.keyboard.press("Enter")
    page.locator("#detail-title").click()
    expect(menu).not_to_have_attribute("open", "")
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
