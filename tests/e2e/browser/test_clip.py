"""Tests of the view Generate: CLIP guidance with a prompt, and the similarity of the finished images to it."""

import ast
import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, Request, Route, expect

from model.png import ClipProvenance, Provenance, encode_png
from model.prompts import MAX_PROMPT_LENGTH, digit_prompt
from tests.e2e.browser.clip import CLIP, answer_score, real_similarity, similarity, stub
from tests.e2e.browser.conftest import DESKTOP, Open, Watched
from tests.e2e.browser.test_draw import drop
from tests.e2e.browser.views import choose_more, generate, predictions, wait_until_finished
from tests.e2e.conftest import Start
from tests.e2e.service import Service, open_png, pngs

BODY = {
    "label": 4,
    "count": 3,
    "seed": 42,
    "num_steps": 4,
    "sampler": "ddim",
    "guidance_scale": 2.5,
    "clip_guidance_scale": 1.5,
    "clip_prompt": "a thick four",
    "model": "default",
}
WITHOUT_CLIP = {name: value for name, value in BODY.items() if not name.startswith("clip")}
ADDRESS = "#/generate?label=4&count=3&seed=42&num_steps=4&sampler=ddim&guidance_scale=2.5&model=default"
NARROW = {"width": 360, "height": 780}
HOSTILE = [
    "<img src=x onerror=\"document.title='changed'\"></q><b>bold</b>",
    "'; touch changed; echo '$(touch changed)`touch changed` \"seven\": \\ {1, 2} \u202etxt.exe ספרה שבע בכתב יד",
    "😀" * MAX_PROMPT_LENGTH,
    "w" * MAX_PROMPT_LENGTH,
]


def similarities(page: Page) -> list[str]:
    return page.locator("#generate-stage .similarity").all_text_contents()[-len(predictions(page)) :]


def explanation(page: Page) -> Any:
    return page.locator("#generate-stage .explanation p").first


def requests_to(page: Page, path: str) -> list[dict[str, Any]]:
    """Returns a list to which the bodies of all later requests to the path are added."""
    bodies: list[dict[str, Any]] = []

    def add(request: Request) -> None:
        if request.url.split("?")[0].endswith(path):
            bodies.append(request.post_data_json)

    page.on("request", add)
    return bodies


def test_guidance_and_similarities_are_those_of_the_api(start: Start, open_page: Open, tmp_path: Path) -> None:
    service = start(UNFOG_CLIP="auto")
    page = open_page(service, permissions=["clipboard-read", "clipboard-write"])
    generate(page, **{name: str(value) for name, value in BODY.items() if name != "model"})
    wait_until_finished(page)
    expected = pngs(service.post(BODY))
    assert predictions(page) == expected
    assert expected != pngs(service.post(WITHOUT_CLIP))
    images = [base64.b64encode(png).decode() for png in expected]
    body = {"images": images, "prompts": [BODY["clip_prompt"]], "fit": "resize", "invert": False}
    answer = service.client.post("/score", json=body).raise_for_status().json()
    real = answer["real_digits"]["similarities"][0][4]
    expect(explanation(page)).to_have_text(f"CLIP similarity to “a thick four”, real digits: {real:.2f}")
    assert [float(text) for text in similarities(page)] == pytest.approx(
        [value for (value,) in answer["similarities"]], abs=0.0051
    )

    page.locator("#generate-stage button.tile").nth(1).click()
    expect(page.locator("#detail .facts")).to_contain_text("CLIP guidance1.5Prompta thick fourCLIP model")
    expect(page.locator("#detail .facts")).to_contain_text(f"CLIP model{answer['clip']['name']}Modeldefault")
    choose_more(page, "Copy as Python", "#detail")
    expect(page.get_by_text("Python program copied.")).to_be_visible()
    program = page.evaluate("navigator.clipboard.readText()")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    again = httpx.post(f"{service.url}/generate", json={**BODY, "scale": 8}).raise_for_status()
    assert (tmp_path / "image.png").read_bytes() == pngs(again)[1]


def test_similarity_is_shown_below_each_image_and_explained(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub())
    sent = requests_to(page, "/score")
    generate(page, label="3", count="4", num_steps="4", seed="1")
    wait_until_finished(page)
    expect(explanation(page)).to_have_text(
        f"CLIP similarity to “{digit_prompt(3)}”, real digits: {real_similarity(3):.2f}"
    )
    assert [body["prompts"] for body in sent] == [[digit_prompt(3)]]
    assert [base64.b64decode(image) for image in sent[0]["images"]] == predictions(page)
    assert similarities(page) == [f"{similarity(index):.2f}" for index in range(4)]
    expect(page.get_by_role("button", name="Image 2 of 4, similarity 0.21: details")).to_be_visible()
    tile, number = (page.locator(f"#generate-stage .pane:visible {name}").first for name in (".tile", ".similarity"))
    above, below = tile.bounding_box(), number.bounding_box()
    assert above
    assert below
    assert below["y"] >= above["y"] + above["height"]
    page.get_by_role("slider", name="Step", exact=True).press("Home")
    expect(page.locator("#generate-stage .similarity").last).to_be_hidden()


def test_service_without_clip_shows_no_field_and_gets_no_call(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub(clip=None))
    sent = requests_to(page, "/score")
    generate(page, label="3", count="2", num_steps="3", seed="1")
    wait_until_finished(page)
    page.wait_for_timeout(200)
    assert sent == []
    expect(page.locator("#clip-guidance")).to_be_hidden()
    expect(page.locator("#clip-prompt")).to_be_hidden()
    expect(page.locator("#generate-stage .explanation")).to_be_hidden()


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (500, '{"code": "internal_error", "detail": "x", "status": 500}'),
        (501, '{"code": "not_available", "detail": "x", "status": 501}'),
        (502, "<html>"),
        (200, '{"similarities": [[0.1], [0.2]], "real_digits": {"similarities": []}}'),
    ],
)
def test_failed_score_does_not_disturb_the_images(
    service: Service, open_page: Open, watched: Watched, status: int, answer: str
) -> None:
    watched.expected.append("/score")
    body = {**WITHOUT_CLIP, "count": 2}
    page = open_page(
        service,
        ADDRESS.replace("count=3", "count=2"),
        prepare=stub(score=lambda route: route.fulfill(status=status, body=answer)),
    )
    with page.expect_response("**/score"):
        wait_until_finished(page)
    page.wait_for_timeout(200)
    assert predictions(page) == pngs(service.post(body))
    assert similarities(page) == ["", ""]
    expect(page.locator("#generate-stage .explanation")).to_be_hidden()
    expect(page.locator(".failure")).to_have_count(0)
    expect(page.locator("#generate-stage button.tile:enabled")).to_have_count(2)
    page.locator("#advanced-button").click()
    expect(page.locator("#clip-guidance")).to_be_visible(visible=status != 501)


def hold_first() -> Callable[[Route], None]:
    """Returns a handler of /score that gives no answer to the first request."""
    held: list[Route] = []

    def answer(route: Route) -> None:
        if held:
            answer_score(route)
        else:
            held.append(route)

    return answer


def hold(route: Route) -> None:
    """Gives no answer."""


def is_score(request: Request) -> bool:
    return request.url.endswith("/score")


def test_new_run_cancels_the_call_of_the_previous_run(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub(score=hold_first()))
    with page.expect_request(is_score):
        generate(page, label="4", count="2", num_steps="3")
    page.route("**/generate?*", hold)
    with page.expect_event("requestfailed", is_score):  # while the new run has no images
        generate(page, label="5")
    page.unroute("**/generate?*", hold)
    generate(page, label="5")
    expect(explanation(page)).to_contain_text(digit_prompt(5))


def test_leaving_the_view_cancels_the_call_and_returning_repeats_it(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub(score=hold_first()))
    with page.expect_request(is_score):
        generate(page, label="4", count="2", num_steps="3")
    sent = requests_to(page, "/score")
    with page.expect_event("requestfailed", is_score):
        page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Generate", exact=True).click()
    expect(explanation(page)).to_contain_text(digit_prompt(4))
    page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Generate", exact=True).click()
    expect(explanation(page)).to_be_visible()
    assert len(sent) == 1


def test_more_images_than_a_call_permits_need_several_calls(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_COUNT="70", UNFOG_MAX_BATCH="70")
    page = open_page(service, prepare=stub())
    sent = requests_to(page, "/score")
    generate(page, label="3", count="70", num_steps="1", seed="1")
    expect(explanation(page)).to_be_visible()
    # The image that the page generates when it is opened can be scored before.
    assert [len(body["images"]) for body in sent][-2:] == [64, 6]
    assert similarities(page) == [f"{similarity(index % 64):.2f}" for index in range(70)]


def test_prompt_needs_guidance_and_its_default_follows_the_digit(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub())
    slider, prompt = page.get_by_label("CLIP guidance"), page.get_by_label("Prompt")
    expect(page.locator("#generate-button")).to_be_enabled()
    page.locator("#advanced-button").click()
    expect(prompt).to_be_disabled()
    expect(prompt).to_have_attribute("placeholder", digit_prompt(7))
    slider.press("ArrowRight")
    expect(page.locator("#clip-guidance-value")).to_have_text("0.05")
    expect(prompt).to_be_enabled()
    slider.press("3")
    expect(prompt).to_have_attribute("placeholder", digit_prompt(3))
    prompt.press_sequentially("digit 9")
    assert page.locator('input[name="label"]:checked').input_value() == "3"
    page.get_by_role("button", name="Reset").click()
    expect(prompt).to_be_disabled()
    expect(prompt).to_have_value("")
    expect(prompt).to_have_attribute("placeholder", digit_prompt(7))
    expect(page.locator("#clip-guidance-value")).to_have_text("off")


def test_fields_are_part_of_the_request_the_address_and_the_history(service: Service, open_page: Open) -> None:
    page = open_page(service, prepare=stub())
    sent = requests_to(page, "/generate")
    generate(page, **{name: str(value) for name, value in BODY.items() if name != "model"})
    expect(explanation(page)).to_contain_text("“a thick four”")
    address = parse_qs(page.url.partition("?")[2])
    assert (address["clip_guidance_scale"], address["clip_prompt"]) == (["1.5"], ["a thick four"])
    page.reload()
    wait_until_finished(page)
    assert sent[1:] == [BODY, BODY]  # after the run of the first visit
    # A prompt without guidance is not sent, and an address without guidance turns it off.
    generate(page, clip_guidance_scale="0", seed="42")
    wait_until_finished(page)
    assert sent[-1] == WITHOUT_CLIP
    expect(page.locator("#history-list li")).to_have_count(2)
    for prompt, body in (("a thick four", BODY), ("", WITHOUT_CLIP)):
        # Without waiting for the request, the stage could still show the run before, which is finished.
        with page.expect_request(lambda request: "/generate" in request.url):
            page.locator("#history-list button").nth(1).click()
        expect(page.locator("#clip-prompt")).to_have_value(prompt)
        assert sent[-1] == body
        wait_until_finished(page)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("clip_guidance_scale=7.25", {"clip_guidance_scale": 7.25}),
        ("clip_guidance_scale=-1&clip_prompt=x", {}),
        ("clip_prompt=x", {}),
        ("clip_guidance_scale=2&clip_prompt=" + "x" * 201, {"clip_guidance_scale": 2}),
    ],
)
def test_address_keeps_values_that_the_service_accepts(
    service: Service, open_page: Open, parameters: str, expected: dict[str, Any]
) -> None:
    page = open_page(service, "#/status", prepare=stub())
    sent = requests_to(page, "/generate")
    page.evaluate("(hash) => { location.hash = hash; }", f"{ADDRESS}&{parameters}")
    wait_until_finished(page)
    assert sent == [{**WITHOUT_CLIP, **expected}]
    shown = expected.get("clip_guidance_scale", 0)
    assert float(page.locator("#clip-guidance").input_value()) == shown


def test_address_with_guidance_is_an_error_without_clip(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("501")
    page = open_page(service, f"{ADDRESS}&clip_guidance_scale=2")
    expect(page.get_by_role("heading", name="This service has no CLIP model")).to_be_visible()
    expect(page.locator("#clip-guidance")).to_be_hidden()
    generate(page)  # the form has no CLIP guidance
    wait_until_finished(page)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompt_is_shown_as_text_and_quoted_in_commands(
    service: Service, open_page: Open, tmp_path: Path, prompt: str
) -> None:
    page = open_page(
        service,
        f"{ADDRESS}&clip_guidance_scale=2&clip_prompt={quote(prompt)}",
        prepare=stub(),
        viewport=NARROW,
        permissions=["clipboard-read", "clipboard-write"],
    )
    wait_until_finished(page)
    expect(page.locator(".explanation .prompt")).to_have_text(prompt)
    assert page.locator("#clip-prompt").input_value() == prompt
    expect(page.locator(".explanation .prompt *")).to_have_count(0)
    assert page.title() == "Generate · unfog"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.locator("#generate-stage button.tile").first.click()
    choose_more(page, "Copy as Python", "#detail")
    expect(page.get_by_text("Python program copied.")).to_be_visible()
    program = page.evaluate("navigator.clipboard.readText()")
    assert program.isascii()
    line = next(line for line in program.splitlines() if line.startswith("body = "))
    assert ast.literal_eval(line.removeprefix("body = "))["clip_prompt"] == prompt
    choose_more(page, "Copy as curl", "#detail")
    expect(page.get_by_text("curl command copied.")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.isascii()
    script = 'curl() { for word; do printf "%s\\0" "$word"; done; }\n' + command
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    words = done.stdout.split("\0")
    assert json.loads(words[words.index("-d") + 1])["clip_prompt"] == prompt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prompt", "sha256"),
    [*((each, CLIP["sha256"]) for each in HOSTILE[1:3]), (None, CLIP["sha256"]), ("a two", "cd" * 32)],
)
def test_dropped_image_restores_the_guidance_with_a_prompt(
    service: Service, open_page: Open, prompt: str | None, sha256: str
) -> None:
    png = service.images(digit=2, seed=11, num_steps=2)[0]
    model_sha256 = open_png(png)[1]["Model-SHA256"]
    chunks = Provenance(("2",), 11, "ddim", 2, 1.5, model_sha256, clip=ClipProvenance(2.5, prompt, sha256)).text(0)
    page = open_page(service, "#/draw", prepare=stub(), viewport=NARROW)
    sent = requests_to(page, "/generate")
    drop(page, "digit.png", encode_png(Image.open(io.BytesIO(png)), text=chunks))
    facts = page.locator("#provenance .facts")
    expect(facts).to_contain_text("CLIP guidance2.5")
    shown = CLIP["name"] if sha256 == CLIP["sha256"] else f"{sha256[:16]}…"
    expect(facts.locator("dt:text-is('CLIP model') + dd")).to_have_text(shown)
    if prompt is not None:
        expect(facts.locator("dt:text-is('Prompt') + dd")).to_have_text(prompt)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_text("This service does not have the CLIP model")).to_be_visible(
        visible=sha256 != CLIP["sha256"]
    )
    page.get_by_role("button", name="Generate again").click()
    wait_until_finished(page)
    assert sent[0]["clip_guidance_scale"] == 2.5
    assert sent[0].get("clip_prompt") == prompt


def test_axe_finds_no_violation_with_guidance_and_similarities(service: Service, open_page: Open) -> None:
    address = f"{ADDRESS}&clip_guidance_scale=2&clip_prompt={quote(HOSTILE[0])}".replace("count=3", "count=64")
    page = open_page(service, address, prepare=stub(), reduced_motion="reduce")
    expect(explanation(page)).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for size in (DESKTOP, NARROW):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            results = Axe().run(page)
            assert results.violations_count == 0, f"{scheme} {size}\n{results.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size
