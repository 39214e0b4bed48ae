"""The view Generate: images emerge, the scrubber, cancel, the address, the dialog of an image, files, errors."""

import base64
import io
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.e2e.browser.conftest import PHONE, Open, Watched
from tests.e2e.browser.views import choose_more, generate, noisy, predictions, wait_until_finished, wait_until_shown
from tests.e2e.conftest import Start
from tests.e2e.process import wait_until
from tests.e2e.service import Service, pngs

BODY = {
    "label": 4,
    "count": 3,
    "seed": 42,
    "num_steps": 12,
    "sampler": "ddim",
    "guidance_scale": 2.5,
    "model": "default",
}
ADDRESS = "#/generate?label=4&count=3&seed=42&num_steps=12&sampler=ddim&guidance_scale=2.5&model=default"


def test_form_generates_the_images_of_the_api_and_a_reload_repeats_them(service: Service, open_page: Open) -> None:
    page = open_page(service)
    generate(page, **{name: str(value) for name, value in BODY.items() if name != "model"})
    wait_until_finished(page)
    expected = pngs(service.post(BODY))
    assert predictions(page) == expected
    assert page.url == f"{service.url}/{ADDRESS}"
    page.reload()
    wait_until_finished(page)
    assert predictions(page) == expected
    assert page.locator('input[name="label"]:checked').input_value() == "4"
    assert page.locator("#guidance-value").text_content() == "2.5"


def test_quality_sets_the_sampler_and_the_steps(service: Service, open_page: Open) -> None:
    page = open_page(service)
    generate(page, label="4", count="2", seed="42", quality="draft")
    wait_until_finished(page)
    assert predictions(page) == pngs(service.post({"label": 4, "count": 2, "seed": 42, "quality": "draft"}))
    assert "num_steps=6&sampler=dpmpp" in page.url
    chosen = page.locator('input[name="quality"]:checked')
    expect(chosen).to_have_value("draft")
    page.reload()
    wait_until_finished(page)
    page.locator("#advanced-button").click()
    expect(chosen).to_have_value("draft")
    chosen.press("ArrowRight")
    expect(page.locator('input[name="quality"]:focus')).to_have_value("balanced")
    expect(page.locator("#num-steps-value")).to_have_text("10")
    page.evaluate("location.hash = '#/generate?label=4&count=1&seed=42&num_steps=12&sampler=ddim&model=default'")
    wait_until_finished(page)
    expect(page.locator("#num-steps-value")).to_have_text("12")
    expect(chosen).to_have_count(0)  # while a button of the quality had the focus
    page.locator("#num-steps").press("ArrowRight")
    expect(chosen).to_have_count(0)
    page.locator("#generate-reset").click()
    expect(chosen).to_have_value("best")


def test_generate_after_a_link_gives_new_images_unless_the_seed_is_kept(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    images = predictions(page)
    page.locator("#generate-button").click()
    expect(page).not_to_have_url(re.compile("seed=42"))
    wait_until_finished(page)
    assert not set(predictions(page)) & set(images)
    page.go_back()
    expect(page).to_have_url(re.compile("seed=42"))
    wait_until_finished(page)
    choose_more(page, "Keep this seed")
    page.locator("#generate-button").click()
    wait_until_finished(page)
    assert predictions(page) == images


def test_moving_the_slider_stops_the_playback(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS.replace("num_steps=12", "num_steps=100"))
    wait_until_finished(page)
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("slider", name="Step", exact=True).click(position={"x": 20, "y": 10})
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    position = page.locator(".scrubber output").text_content()
    page.wait_for_timeout(300)
    assert page.locator(".scrubber output").text_content() == position


def test_back_leaves_a_run_that_the_address_started_and_closes_its_dialog(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/status")
    expect(page.get_by_role("heading", name="Status")).to_be_visible()
    page.evaluate("location.hash = '#/generate?digit=4&seed=42&num_steps=3&count=1'")
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").click()
    page.go_back()
    expect(page.get_by_role("heading", name="Status")).to_be_visible()
    expect(page.locator("#detail")).to_be_hidden()


def test_scrubber_shows_every_step_by_keyboard(service: Service, open_page: Open) -> None:
    with service.events(BODY, "?previews=100&include=x_t") as events:
        frames = [data for name, data in events if name == "progress"]
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    slider = page.get_by_role("slider", name="Step", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    for step in range(1, len(frames)):
        frame = frames[step - 1]
        expect(slider).to_have_attribute("aria-valuetext", f"step {step} of 12")
        assert predictions(page) == [base64.b64decode(png) for png in frame["previews"]]
        assert noisy(page) == [base64.b64decode(png) for png in frame["x_t"]]
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "step 12 of 12")
    assert predictions(page) == pngs(service.post(BODY))
    expect(page.get_by_text("x_t: the noisy image")).to_be_hidden()


def test_play_shows_the_steps_from_the_first_to_the_last(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_text("x_t: the noisy image")).to_be_visible()
    wait_until_finished(page)
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_digit_keys_choose_the_digit_unless_the_user_types(service: Service, open_page: Open) -> None:
    page = open_page(service)
    expect(page.locator("#generate-button")).to_be_enabled()
    chosen = page.locator('input[name="label"]:checked')
    page.keyboard.press("2")
    expect(chosen).to_have_value("2")
    page.locator("#advanced-button").click()
    page.locator("#guidance").press("3")
    expect(chosen).to_have_value("3")
    page.locator("#seed").press("8")
    expect(page.locator("#seed")).to_have_value("8")
    expect(chosen).to_have_value("3")
    page.get_by_role("link", name="Draw").click()
    expect(page.locator("#pad")).to_be_visible()
    page.keyboard.press("5")
    page.get_by_role("link", name="Generate").click()
    expect(chosen).to_have_value("3")


def test_cancel_stops_the_images_in_the_service(service: Service, open_page: Open) -> None:
    service.wait_until_idle()
    before = service.metrics().value("cancelled_total", stage="running")
    page = open_page(service)
    generate(page, label="1", count="64", num_steps="100")
    expect(page.get_by_text(re.compile(r"Step \d+ of 100"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#generate-stage").get_by_text(re.compile(r"^Cancelled after"))).to_be_visible()
    wait_until(lambda: service.metrics().value("cancelled_total", stage="running") > before, "images are cancelled")
    service.wait_until_idle()
    page.get_by_role("button", name="Run again").click()
    expect(page.get_by_text(re.compile(r"Step \d+ of 100"))).to_be_visible()


@pytest.mark.parametrize("index", [0, 2])
def test_dialog_copies_commands_that_generate_the_image_again(
    service: Service, open_page: Open, tmp_path: Path, index: int
) -> None:
    page = open_page(service, ADDRESS, permissions=["clipboard-read", "clipboard-write"])
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").nth(index).click()
    assert page.locator("#detail").get_by_text("42", exact=True).is_visible()
    response = httpx.post(f"{service.url}/generate", json={**BODY, "scale": 8}).raise_for_status()
    expected = pngs(response)[index]

    choose_more(page, "Copy as Python", "#detail")
    expect(page.get_by_text("Python program copied.")).to_be_visible()
    program = page.evaluate("navigator.clipboard.readText()")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "image.png").read_bytes() == expected

    choose_more(page, "Copy as curl", "#detail")
    expect(page.get_by_text("curl command copied.")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()").partition(" | jq")[0].replace("\\\n", " ")
    words = shlex.split(command)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    body = json.loads(words[words.index("-d") + 1])
    address = next(word for word in words if word.startswith("http"))
    again = httpx.post(address, json=body, headers=headers).raise_for_status()
    assert (again.content if index == 0 else pngs(again)[index]) == expected
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()


def test_downloads_equal_the_response_of_the_api(service: Service, open_page: Open) -> None:
    expected = pngs(service.post(BODY))
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    with page.expect_download() as download:
        choose_more(page, "All images (ZIP)")
    assert download.value.suggested_filename == "digit-4-seed-42.zip"
    with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as archive:
        assert archive.testzip() is None
        names = [f"digit-4-seed-42-{index}.png" for index in range(3)]
        assert archive.namelist() == names
        assert [archive.read(name) for name in names] == expected
    page.locator("#generate-stage button.tile").nth(1).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert download.value.path().read_bytes() == expected[1]


def test_dialog_moves_between_finished_images_by_keyboard(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    page.locator("#generate-stage button.tile").nth(2).click()
    page.get_by_role("button", name="Next").focus()
    for number in (1, 2):
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name=f"Image {number} of 3")).to_be_visible()
        expect(page.get_by_role("button", name="Next")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", name="Image 1 of 3")).to_be_visible()


def test_dialog_of_a_cancelled_run_skips_unfinished_images(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300")
    first = pngs(service.post({"label": 1, "num_steps": 50, "seed": 1}))
    page = open_page(service)
    generate(page, label="1", count="32", num_steps="50", seed="1")
    # The counters of the service can be ahead of a slow browser, so the page itself must have a finished image.
    wait_until(lambda: predictions(page)[:1] == first, "the page has the first image")
    page.get_by_role("button", name="Cancel").click()
    finished = page.locator("#generate-stage button.tile:enabled")
    expect(finished.first).to_be_visible()
    count = finished.count()
    finished.first.click()
    for _ in range(count):
        page.get_by_role("button", name="Next").click()
        expect(page.locator(".detail-image")).not_to_have_attribute("src", re.compile("null|undefined"))
    expect(page.get_by_role("heading", name="Image 1 of 32")).to_be_visible()


def test_guidance_scale_of_the_address_is_not_rounded(service: Service, open_page: Open) -> None:
    body = {**BODY, "guidance_scale": 2.537}
    page = open_page(service, ADDRESS.replace("2.5", "2.537"))
    wait_until_finished(page)
    assert predictions(page) == pngs(service.post(body))
    assert "guidance_scale=2.537" in page.url


def test_unknown_model_in_the_address_is_an_error(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("422")
    page = open_page(service, ADDRESS.replace("model=default", "model=other"))
    expect(page.get_by_role("heading", name="The request is not valid")).to_be_visible()
    expect(page.locator(".failure")).to_contain_text("model")


@pytest.mark.parametrize(
    "parameters", ["digit=77&seed=x&count=0", "digit=<b>&sampler=<img>", "seed=1e999", "%", "&&=&"]
)
def test_address_with_invalid_parameters_generates_the_default_digit(
    service: Service, open_page: Open, parameters: str
) -> None:
    page = open_page(service, f"#/generate?{parameters}")
    wait_until_finished(page)
    assert len(predictions(page)) == 4
    expect(page.locator(".scrubber output")).to_have_text("100 / 100")


@pytest.mark.parametrize("view", ["nothing", "constructor", "toString"])
def test_unknown_view_in_the_address_shows_the_form(service: Service, open_page: Open, view: str) -> None:
    page = open_page(service, f"#/{view}")
    expect(page.locator("#generate-button")).to_be_enabled()


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        (
            "seed",
            "The seed must be a whole number from 0 to 9007199254740991.",
            {"9007199254740992": " 42 ", "1e5": "100000", "-3": "", "seven": "7"},
        ),
        ("count", "Choose 1 to 64 images.", {"5000": "64", "0": "1", "1.5": "2", "": "3"}),
    ],
)
def test_invalid_field_is_explained_and_nothing_is_sent(
    service: Service, open_page: Open, field: str, text: str, values: dict[str, str]
) -> None:
    """`values` are invalid values, each with a valid one."""
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.method))
    entry, hint = page.locator(f"#{field}"), page.locator(f"#{field}-hint")
    for value, valid in values.items():
        generate(page, **{field: value})
        expect(hint).to_contain_text(text)
        expect(entry).to_be_focused()
        page.locator("#advanced-button").click()
        page.locator("#generate-button").click()  # shows the field again
        expect(entry).to_be_focused()
        assert "POST" not in requests
        entry.fill(valid)
        expect(entry).to_have_attribute("aria-invalid", "false")
        expect(hint).not_to_contain_text(text)
        entry.fill(value)
        expect(entry).to_have_attribute("aria-invalid", "true")
        page.get_by_role("button", name="Reset all fields").click()
        expect(entry).to_have_attribute("aria-invalid", "false")
        expect(hint).not_to_contain_text(text)


def test_damaged_history_is_ignored(service: Service, open_page: Open) -> None:
    page = open_page(service)
    for stored in ("{}", '"abc"', "5", "[null]", '[{"address": 1}]', "not JSON"):
        page.evaluate("(stored) => localStorage.setItem('unfog-history', stored)", stored)
        page.reload()
        expect(page.locator("#generate-button")).to_be_enabled()
        expect(page.locator("#history")).to_be_hidden()


def test_page_works_without_storage(service: Service, open_page: Open) -> None:
    page = open_page(service)
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('blocked'); }});"
    )
    page.reload()
    page.get_by_role("button", name="Switch between light and dark").click()
    generate(page, label="1", count="1", num_steps="3", seed="1")
    wait_until_finished(page)


def test_history_brings_back_an_earlier_run(service: Service, open_page: Open) -> None:
    page = open_page(service, ADDRESS)
    wait_until_finished(page)
    first = predictions(page)
    page.goto(f"{service.url}/{ADDRESS.replace('label=4', 'label=5')}")
    expect(page.locator("#history-list li")).to_have_count(2)
    assert predictions(page) != first
    wait_until_finished(page)
    page.get_by_role("button", name="Digit 4, 3 images, seed 42").click()
    wait_until_shown(page, first[0])  # until then, the other run can still be on the stage
    wait_until_finished(page)
    assert predictions(page) == first
    page.get_by_role("button", name="Clear the history").click()
    expect(page.locator("#history")).to_be_hidden()


def test_model_with_few_steps_offers_only_what_it_permits(start: Start, fast_checkpoint: Path, open_page: Open) -> None:
    service = start(UNFOG_FAST_CHECKPOINT=str(fast_checkpoint))
    page = open_page(service)
    generate(page, model="fast", label="6", count="1", seed="5")
    wait_until_finished(page)
    assert page.locator('input[name="sampler"]:enabled').evaluate_all("all => all.map((input) => input.value)") == [
        "ddim"
    ]
    assert page.locator("#guidance").is_disabled()
    expect(page.locator("#steps-hint")).to_have_text("The model fast was trained for 4 or 2 steps.")
    expect(page.locator("#guidance-hint")).to_have_text("The model fast takes no guidance scale.")
    assert predictions(page) == service.images(digit=6, seed=5, model="fast")


def test_quality_is_kept_for_another_model_and_the_slider_ends_it(
    start: Start, fast_checkpoint: Path, open_page: Open
) -> None:
    page = open_page(start(UNFOG_FAST_CHECKPOINT=str(fast_checkpoint)))
    steps, chosen = page.locator("#num-steps-value"), page.locator('input[name="quality"]:checked')

    def choose(name: str, value: str) -> None:
        page.locator(f'#generate-form input[name="{name}"][value="{value}"]').check(force=True)

    page.locator("#advanced-button").click()
    choose("quality", "draft")
    expect(steps).to_have_text("6")
    choose("model", "fast")
    expect(steps).to_have_text("2")
    choose("model", "default")
    expect(steps).to_have_text("6")
    choose("model", "fast")
    page.locator("#num-steps").press("End")
    expect(steps).to_have_text("4")
    expect(chosen).to_have_value("best")
    page.locator("#num-steps").press("Home")
    expect(steps).to_have_text("2")
    expect(chosen).to_have_value("draft")


def test_full_queue_counts_down_and_then_the_request_can_be_repeated(
    start: Start, open_page: Open, watched: Watched
) -> None:
    service = start(UNFOG_QUEUE_CAPACITY="64", UNFOG_MAX_BATCH="4")
    watched.expected.append("429")
    page = open_page(service)
    wait_until_finished(page)  # The queue has no room for 64 images while the first image of the page waits in it.
    with service.events({"digit": 1, "count": 64, "num_steps": 20}) as events:
        next(events)
        generate(page, label="2", count="64", num_steps="2", seed="1")
        expect(page.get_by_role("heading", name="The service is busy")).to_be_visible()
        retry = page.get_by_role("button", name="Try again")
        expect(retry).to_be_disabled()
        expect(page.get_by_role("timer")).to_have_text(re.compile(r"You can try again in \d+ seconds?\."))
    service.wait_until_idle()
    expect(retry).to_be_enabled()
    retry.click()
    wait_until_finished(page)
    assert predictions(page) == service.images(digit=2, count=64, num_steps=2, seed=1)


def test_phone_shows_the_form_and_then_the_images(service: Service, open_page: Open) -> None:
    page = open_page(service, viewport=PHONE, has_touch=True)
    generate(page, label="9", count="4", num_steps="5", seed="3")
    wait_until_finished(page)
    expect(page.locator("#generate-stage button.tile").first).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
