"""The view Draw: a drawing by mouse, real digits, the four tasks, and pictures that are dropped or opened."""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from model.spec import SHIPPED
from tests.e2e.browser.conftest import DESKTOP, PHONE, Open
from tests.e2e.browser.views import predictions, wait_until_finished
from tests.e2e.conftest import start_service
from tests.e2e.service import Service, open_png

DROP = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  for (const kind of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
  }
}"""


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    """A service with the shipped models, because a network with random weights recognises nothing."""
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, UNFOG_REQUEST_TIMEOUT="300")


def drop(page: Page, name: str, content: bytes) -> None:
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])


def draw_seven(page: Page) -> None:
    """Draws a seven in one stroke."""
    box = page.locator("#pad").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.25 * box["height"], steps=8)
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.8 * box["height"], steps=8)
    page.mouse.up()


def verdict(page: Page) -> Any:
    return page.locator(".verdict strong")


def test_drawn_seven_is_recognised_and_its_bars_are_those_of_the_api(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    expect(page.locator("#recognize-result").get_by_text("Draw a digit.")).to_be_visible()
    with page.expect_response("**/recognize") as response:
        draw_seven(page)
    expect(verdict(page)).to_have_text("7")
    shown = [float(text.rstrip("%")) / 100 for text in page.locator(".bars .value").all_text_contents()]
    assert shown == pytest.approx(response.value.json()["probabilities"], abs=6e-4)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#recognize-result").get_by_text("Draw a digit.")).to_be_visible()


def test_every_real_digit_is_recognised(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    for digit in range(10):
        page.locator("#pad-digits").get_by_role("button", name=f"Digit {digit}").click()
        expect(verdict(page)).to_have_text(str(digit))


def test_noise_is_added_and_removed(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    page.locator("#pad-digits").get_by_role("button", name="Digit 3").click()
    page.get_by_role("tab", name="Remove noise").click()
    page.get_by_role("button", name="Remove the noise").click()
    wait_until_finished(page, "#denoise-result")
    expect(page.locator("#denoise-result").get_by_text("Digit: 3")).to_be_visible()
    text = page.locator("#denoise-result > p").inner_text()
    estimated = re.search(r"Estimated noise: ([\d.]+)", text)
    assert estimated
    assert float(estimated[1]) == pytest.approx(120, rel=0.25)  # one image; the mean error is about 4%
    decibels = [float(each) for each in re.findall(r"([\d.]+) dB", page.locator("#denoise-result").inner_text())]
    assert decibels[1] > decibels[0] + 8  # the prediction is much closer to the drawing than the noisy image


def test_hint_of_a_task_stays_when_a_recognition_ends(shipped: Service, open_page: Open) -> None:
    page, waiting = open_page(shipped, "#/draw"), list[Route]()
    page.route("**/recognize", lambda route: waiting.append(route))
    with page.expect_request("**/recognize"):
        draw_seven(page)
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Fill in").click()
    hint = page.get_by_text("Paint over the part to fill in")
    expect(hint).to_be_visible()
    with page.expect_response("**/recognize"):
        waiting[0].continue_()
    expect(verdict(page)).to_have_text("7")
    expect(hint).to_be_visible()


def test_marked_part_is_filled_in_and_the_rest_is_kept(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    page.locator("#pad-digits").get_by_role("button", name="Digit 4").click()
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Fill in").click()
    expect(page.get_by_text("Paint over the part to fill in")).to_be_visible()
    page.get_by_role("button", name="Mark the lower half").click()
    with page.expect_request("**/inpaint*") as request:
        page.get_by_role("button", name="Fill in").click()
    wait_until_finished(page, "#inpaint-result")
    original = open_png(base64.b64decode(request.value.post_data_json["image"]))[0][:, :, 0]
    images = [open_png(png)[0] for png in predictions(page, "#inpaint-result")]
    assert len(images) == 4
    for pixels in images:
        assert np.array_equal(pixels[:14], original[:14])
        assert not np.array_equal(pixels[14:], original[14:])


def test_mask_can_be_painted_with_the_keyboard(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    page.locator("#pad-digits").get_by_role("button", name="Digit 0").click()
    page.get_by_role("tab", name="Recognise").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Fill in")).to_be_focused()
    page.locator("#mask").focus()
    for key in ("ArrowUp", "ArrowLeft", " "):
        page.keyboard.press(key)
    with page.expect_request("**/inpaint*") as request:
        page.get_by_role("button", name="Fill in").click()
    mask = open_png(base64.b64decode(request.value.post_data_json["mask"]))[0][:, :, 0]
    expected = np.zeros((28, 28), np.uint8)
    expected[11:16, 11:16] = 255  # 5 x 5 pixels around (13, 13)
    assert np.array_equal(mask, expected)


def test_sketch_is_redrawn_as_its_digit(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    draw_seven(page)
    page.get_by_role("tab", name="Redraw").click()
    page.get_by_role("button", name="Redraw").click()
    wait_until_finished(page, "#edit-result")
    expect(page.locator("#edit-result").get_by_text("Digit: 7")).to_be_visible()
    assert len(set(predictions(page, "#edit-result"))) == 4


def test_dropped_image_of_the_service_restores_its_parameters(shipped: Service, open_page: Open) -> None:
    body = {"digit": 2, "seed": 11, "count": 2, "num_steps": 6, "sampler": "ddim", "guidance_scale": 1.5}
    images = shipped.images(**body)
    page = open_page(shipped, "#/draw")
    drop(page, "digit.png", shipped.images(**body, scale=5)[1])
    expect(page.get_by_role("heading", name="This picture was made by unfog")).to_be_visible()
    expect(page.locator("#provenance")).to_contain_text("11")
    page.get_by_role("button", name="Generate again").click()
    wait_until_finished(page)
    assert predictions(page) == images
    assert "label=2&count=2&seed=11&num_steps=6&sampler=ddim&guidance_scale=1.5&model=default" in page.url


def test_dark_strokes_on_white_are_inverted(shipped: Service, open_page: Open) -> None:
    png = shipped.images(digit=6, seed=1, num_steps=10, sampler="dpmpp", scale=4)[0]
    inverted = io.BytesIO()
    Image.fromarray(255 - open_png(png)[0]).save(inverted, "JPEG")
    page = open_page(shipped, "#/draw")
    drop(page, "photo.jpg", inverted.getvalue())
    expect(verdict(page)).to_have_text("6")
    expect(page.locator("#provenance")).to_be_hidden()


def test_request_to_draw_first_disappears_with_a_drawing(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    page.get_by_role("tab", name="Remove noise").click()
    expect(page.locator("#denoise-result")).to_have_text("Draw a digit first.")
    page.locator("#pad-digits").get_by_role("button", name="Digit 2").click()
    expect(page.locator("#denoise-result")).to_have_text("")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_file_that_is_no_picture_is_refused_with_a_reason_below_the_drawing(
    shipped: Service, open_page: Open, size: dict[str, int]
) -> None:
    page = open_page(shipped, "#/draw", viewport=size)
    page.locator("#pad-digits").get_by_role("button", name="Digit 2").click()
    expect(verdict(page)).to_have_text("2")
    page.evaluate("scrollTo(0, 0)")
    page.locator("#pad-file").set_input_files({"name": "text.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.get_by_role("heading", name="The picture cannot be read")).to_be_in_viewport(ratio=1)
    pad, error = page.locator("#pad").bounding_box(), page.locator("#provenance").bounding_box()
    assert pad
    assert error
    assert 0 < error["y"] - (pad["y"] + pad["height"]) < 150  # only the buttons of the drawing are between them


def test_picture_that_is_not_a_digit_shows_no_digit_and_marks_no_bar(shipped: Service, open_page: Open) -> None:
    page = open_page(shipped, "#/draw")
    checkers = np.kron(np.indices((7, 7)).sum(axis=0) % 2 * 255, np.ones((40, 40))).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(checkers).save(picture, "PNG")
    with page.expect_response("**/recognize") as response:
        drop(page, "checkers.png", picture.getvalue())
    assert not response.value.json()["is_digit"]
    expect(page.locator("#recognize-result").get_by_text("This is probably not a digit.")).to_be_visible()
    expect(verdict(page)).to_have_count(0)
    expect(page.locator("#recognize-result .best")).to_have_count(0)
