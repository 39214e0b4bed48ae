"""The view Understand: forward process, when the digit is decided, guidance, fewer steps."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from model.schedule import Schedule, ScheduleConfig
from tests.e2e.browser.conftest import Open, Watched
from tests.e2e.browser.views import pngs_of, wait_until_compared
from tests.e2e.conftest import GUIDANCE, Start
from tests.e2e.service import Service

PIXELS = "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 28, 28).data).filter((_, i) => i % 4 === 0)"


def move_to(page: Page, t: int) -> None:
    slider = page.locator("#forward-t")
    slider.evaluate("(input, t) => { input.value = t; input.dispatchEvent(new Event('input', {bubbles: true})); }", t)


def test_slider_shows_the_forward_process_and_the_prediction(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand")
    tiles = page.locator("#forward-tiles canvas")
    expect(page.locator("#decided-run")).to_be_enabled()
    digit = tiles.nth(0).evaluate(PIXELS)
    assert max(digit) > 200
    move_to(page, 0)
    assert tiles.nth(1).evaluate(PIXELS) == digit
    alpha_bar = Schedule(ScheduleConfig()).alpha_bar
    for t in (30, 70):
        signal, noise = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
        noise_std = pytest.approx(noise / signal * 127.5, rel=1e-3)
        with page.expect_response(
            lambda response, std=noise_std: (
                "denoise" in response.url  # type: ignore[misc]
                and response.request.post_data_json["noise_std"] == std
            )
        ) as response:
            move_to(page, t)
        expect(page.locator("#forward-equation")).to_have_text(f"x_t = {signal:.3f} · x_0 + {noise:.3f} · noise")
        predicted = response.value.json()["images"][0]["png"]
        expect(page.locator("#forward-tiles img")).to_have_attribute("src", f"data:image/png;base64,{predicted}")


def test_measurement_shows_the_probabilities_of_each_noise_level(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand", viewport={"width": 1280, "height": 500})
    sent: list[Request] = []  # An event handler that reads the answer of a response could miss the next response.
    page.on(
        "request",
        lambda request: (
            sent.append(request) if request.url.endswith("/denoise") and "seed" in request.post_data_json else None
        ),
    )
    page.locator("#forward-digits").get_by_role("button", name="Digit 8").click()
    page.wait_for_timeout(500)
    assert sent == []  # The section is not in view yet.
    page.locator("#decided-result").scroll_into_view_if_needed()
    expect(page.get_by_role("button", name="Measure")).to_be_disabled()
    expect(page.get_by_role("button", name="Measure")).to_be_enabled()
    assert len(sent) == 14
    answers = [request.response().json() for request in sent]  # type: ignore[union-attr]
    rows = page.locator(".decided-rows > div")
    assert len(pngs_of(rows.nth(1).locator("img"))) == 14
    assert len(pngs_of(rows.nth(2).locator("img"))) == 14
    labels = rows.nth(3).locator("span").all_text_contents()
    expected = [
        f"{answer['digit']} {math.floor(100 * answer['probabilities'][answer['digit']] + 0.5)}%" for answer in answers
    ]
    assert labels == expected
    expect(page.locator("#decided-result svg")).to_have_attribute(
        "aria-label", re.compile("there is only noise|No digit")
    )


def test_drawing_can_be_used_after_it_was_only_recognised(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("willReadFrequently")  # of this test, which reads a canvas often
    page = open_page(service, "#/draw")
    page.locator("#pad-digits").get_by_role("button", name="Digit 3").click()
    page.locator("#pad-digits").get_by_role("button", name="Digit 8").click()
    page.get_by_role("link", name="Understand").click()
    expect(page.locator("#decided-run")).to_be_enabled()
    page.get_by_role("button", name="Use my drawing").click()
    tile = page.locator("#forward-tiles canvas").nth(0)
    drawing = tile.evaluate(PIXELS)
    page.locator("#forward-digits").get_by_role("button", name="Digit 8").click()
    assert tile.evaluate(PIXELS) == drawing


def test_leaving_the_view_stops_a_measurement(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand")
    expect(page.locator("#decided-run")).to_be_enabled()
    page.locator("#decided-result").scroll_into_view_if_needed()
    expect(page.locator(".decided-rows > div").nth(2).locator("img").first).to_be_visible()
    page.get_by_role("link", name="Status").click()
    service.wait_until_idle()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.wait_for_timeout(1000)
    assert not any("denoise" in url for url in sent)


def test_new_digit_stops_a_measurement(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand")
    expect(page.locator("#decided-run")).to_be_enabled()
    page.locator("#decided-result").scroll_into_view_if_needed()
    expect(page.locator(".decided-rows > div").nth(2).locator("img").first).to_be_visible()
    page.locator("#forward-digits").get_by_role("button", name="Digit 1").click()
    expect(page.get_by_role("button", name="Measure")).to_be_enabled()
    expect(page.locator("#decided-result").get_by_text("A measurement sends")).to_be_visible()
    page.wait_for_timeout(500)
    expect(page.locator("#decided-result").get_by_text("A measurement sends")).to_be_visible()


def test_model_without_tasks_and_guidance_hides_what_it_does_not_support(
    start: Start, fast_checkpoint: Path, open_page: Open
) -> None:
    service = start(UNFOG_CHECKPOINT=str(fast_checkpoint), UNFOG_MAX_COUNT="2")
    page = open_page(service, "#/understand")
    expect(page.locator("#steps-run")).to_be_enabled()
    for part in ("#decided", "#guidance-section", "#forward-drawing"):
        expect(page.locator(part)).to_be_hidden()
    page.locator("#steps-run").click()
    expect(page.locator("#steps-result img")).to_have_count(2)
    page.get_by_role("link", name="Draw").click()
    expect(page.get_by_text("This model only generates images.")).to_be_visible()
    page.get_by_role("link", name="Batch").click()
    page.get_by_role("button", name="Send sample requests").click()
    wait_until_compared(page)
    # Two requests of the comparison, and the four sample requests twice.
    service.wait_for(10, "requests_total", route="/generate", code="200")
    expect(page.locator("#batch-problem")).to_have_text("")


def test_guidance_scales_start_from_the_same_noise(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/understand")
    marked = f"guidance acts from t = {GUIDANCE.stop} down to t = {GUIDANCE.start}"
    expect(page.locator("#guidance-chart .legend")).to_contain_text(marked)
    page.locator("#guidance-label").select_option("5")
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("#guidance-run").click()
    expect(page.locator("#guidance-result img")).to_have_count(6)
    scales = [1, 1.5, 2, 3, 5, 8]
    (seed,) = {body["seed"] for body in sent if "guidance_scale" in body}
    expected = [
        service.images(digit=5, seed=seed, num_steps=50, sampler="ddim", guidance_scale=scale)[0] for scale in scales
    ]
    assert pngs_of(page.locator("#guidance-result img")) == expected
    captions = page.locator("#guidance-result figcaption").all_text_contents()
    assert captions == ["off", "1.5", "2 (recommended)", "3", "5", "8"]


def test_fewer_steps_are_compared_with_their_network_calls(
    start: Start, fast_checkpoint: Path, open_page: Open
) -> None:
    service = start(UNFOG_FAST_CHECKPOINT=str(fast_checkpoint))
    page = open_page(service, "#/understand")
    page.locator("#steps-run").click()
    expect(page.locator("#steps-result img")).to_have_count(6)
    cells = [row.locator("td").all_text_contents() for row in page.locator("#steps-result tbody tr").all()]
    assert [(name, steps) for _, name, steps, *_ in cells] == [
        ("DDPM", "100"),
        ("DPM-Solver++", "20"),
        ("DPM-Solver++", "10"),
        ("DPM-Solver++", "4"),
        ("model fast", "4"),
        ("model fast", "2"),
    ]
    expect(page.locator("#steps-run")).to_be_enabled()
    guided = GUIDANCE.stop - GUIDANCE.start + 1
    assert cells[0][3] == str(100 + guided)
    assert [cells[row][3] for row in (4, 5)] == ["4", "2"]
