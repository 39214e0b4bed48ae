"""The page with models of other classes and images: names, colours, sizes, several models, and models without tasks.

Most tests replace the answers of the service (see `other_models`). The tests with `colour_service` do not.
"""

import base64
import io
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, Request, expect

from model.checkpoint import CheckpointConfig, save
from model.schedule import ScheduleConfig
from tests.e2e.browser.conftest import DESKTOP, FIRST_VISIT, PHONE, Open, Watched
from tests.e2e.browser.other_models import COLOUR, DIGITS, NAMES, model, picture_in, pixels_of, png_of, serve
from tests.e2e.browser.test_draw import draw_seven, drop, verdict
from tests.e2e.browser.views import choose_more, generate, predictions, wait_until_compared, wait_until_finished
from tests.e2e.conftest import GUIDANCE, start_service
from tests.e2e.service import Service, open_png, pngs
from tests.tiny import tiny_unet

DIGIT_MODEL = model("default", DIGITS, (1, 28, 28))
FEW_STEPS = model("fast", DIGITS, (1, 28, 28), steps=[4], default_steps=4, samplers=["ddim"], has_picture_tasks=False)
MANY = model("many", [f"class number {label}, with a long name" for label in range(1000)], (3, 64, 64))
ONE_CLASS = model("own", ["image"], (3, 32, 32), guidable=False)
GREY = model("grey", ["shirt", "shoe"], (1, 8, 8))
CANVAS = "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
ADDRESS = "#/generate?label=1&count=4&seed=5&model=pictures"


def requests_to(page: Page, path: str) -> list[dict[str, Any]]:
    """Returns a list to which the bodies of all later requests to the path are added."""
    bodies: list[dict[str, Any]] = []

    def add(request: Request) -> None:
        if request.method == "POST" and request.url.split("?")[0].endswith(path):
            bodies.append(request.post_data_json)

    page.on("request", add)
    return bodies


def pixels_on(page: Page, canvas: str, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the pixels (H, W, 3) of the only canvas that the selector finds."""
    pixels = np.array(page.locator(canvas).evaluate(CANVAS), np.uint8).reshape(side, side, 4)
    return pixels[:, :, :3]


def draw(page: Page) -> None:
    """Draws a stroke as soon as the page knows the model."""
    expect(page.get_by_text("The result appears after each stroke.")).to_be_visible()
    draw_seven(page)


@pytest.fixture(scope="module")
def colour_service(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Service]:
    """A service whose default model, `pictures`, generates colour images of 32x32 pixels of the classes NAMES."""
    network = tiny_unet(seed=4, image_size=32, image_channels=3, num_classes=len(NAMES))
    for parameter in network.parameters():
        parameter.mul_(0.6)  # With larger weights, all pixels are clipped.
    path = tmp_path_factory.mktemp("pictures") / "pictures.safetensors"
    config = CheckpointConfig(
        network.config, ScheduleConfig(), class_names=tuple(NAMES), guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    save(path, network, config)
    with ExitStack() as stack:
        yield start_service(stack, path, UNFOG_MODELS=f"pictures={path},digits={checkpoint}")


def test_names_are_buttons_and_the_number_of_the_class_is_sent(service: Service, open_page: Open) -> None:
    page = open_page(service, FIRST_VISIT, prepare=serve(COLOUR))
    wait_until_finished(page)
    expect(page.get_by_role("heading", level=1)).to_have_text("Generate an image")
    assert page.locator("#label-keys label").all_text_contents() == NAMES
    expect(page.get_by_role("radio", name="apple")).to_be_checked()
    expect(page.locator("#model")).to_be_hidden()
    page.keyboard.press("3")  # the keys are those of digits
    expect(page.get_by_role("radio", name="apple")).to_be_checked()
    page.get_by_role("radio", name="apple").press("ArrowRight")
    sent = requests_to(page, "/generate")
    page.locator("#generate-button").click()
    wait_until_finished(page)
    assert [(body["label"], body["model"]) for body in sent] == [(1, "pictures")]
    assert predictions(page) == [png_of(COLOUR, 1, index) for index in range(4)]
    expect(page.get_by_role("button", name="automobile, image 2 of 4: details")).to_be_visible()
    expect(page.get_by_role("button", name="automobile, 4 images")).to_be_visible()  # in the history


@pytest.mark.parametrize("label", ["1", "automobile"])
def test_address_names_the_class_by_its_number_or_name(service: Service, open_page: Open, label: str) -> None:
    page = open_page(service, ADDRESS.replace("label=1", f"label={label}"), prepare=serve(COLOUR))
    wait_until_finished(page)
    assert predictions(page) == [png_of(COLOUR, 1, index) for index in range(4)]
    expect(page.get_by_role("radio", name="automobile")).to_be_checked()
    assert "label=1&" in page.url
    page.locator("#generate-stage button.tile").first.click()
    expect(page.locator("#detail .facts")).to_contain_text("Classautomobile")


def test_class_that_the_model_does_not_have_is_left_out(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/generate?label=20&seed=5", prepare=serve(COLOUR))
    wait_until_finished(page)
    assert predictions(page)[0] == png_of(COLOUR, 0, 0)


def test_picture_with_caption_shows_colours_and_keeps_the_name(service: Service, open_page: Open) -> None:
    last = len(NAMES) - 1  # a name with characters outside ASCII
    page = open_page(service, ADDRESS.replace("label=1", f"label={last}"), prepare=serve(COLOUR))
    wait_until_finished(page)
    with page.expect_download() as download:
        choose_more(page, "Picture with caption")
    assert download.value.suggested_filename == "class-19-seed-5.png"
    pixels, text, _ = open_png(download.value.path().read_bytes())
    assert (text["Label"], text["Index"]) == ('"caf\\u00e9"', "0-3")
    side = 14 * 32  # 896 pixels for two images
    assert pixels.shape[1] == 2 * side
    for index in range(4):
        top, left = index // 2 * side, index % 2 * side
        assert (pixels[top : top + side, left : left + side, :3] == pixels_of(COLOUR, last, index)[0, 0]).all()
    page.locator("#generate-stage button.tile").first.click()
    expect(page.locator("#detail .facts")).to_contain_text("Classcafé")


@pytest.mark.parametrize(("side", "scale"), [(8, 16), (32, 7), (256, 1)])
def test_animation_and_copied_code_have_a_scale_that_the_service_permits(
    service: Service, open_page: Open, side: int, scale: int
) -> None:
    served = model("pictures", NAMES, (3, side, side))
    page = open_page(service, ADDRESS, prepare=serve(served), permissions=["clipboard-read", "clipboard-write"])
    wait_until_finished(page)
    with page.expect_request(lambda request: request.headers["accept"] == "image/gif") as request:
        page.get_by_role("button", name="Save as animation").click()
    assert request.value.post_data_json["scale"] == scale  # two columns in 448 pixels
    page.locator("#generate-stage button.tile").first.click()
    choose_more(page, "Copy as curl", "#detail")
    expect(page.get_by_text("curl command copied.")).to_be_visible()
    assert f'"scale":{scale}' in page.evaluate("navigator.clipboard.readText()")


def test_many_classes_are_a_list(service: Service, open_page: Open) -> None:
    page = open_page(service, FIRST_VISIT, prepare=serve(MANY), viewport=PHONE)
    wait_until_finished(page)
    picker = page.get_by_role("combobox", name="Class")
    expect(picker.locator("option")).to_have_count(1000)
    picker.select_option("class number 999, with a long name")
    sent = requests_to(page, "/generate")
    page.locator("#generate-button").click()
    wait_until_finished(page)
    assert sent[0]["label"] == 999
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("link", name="Draw").click()
    draw(page)
    expect(verdict(page)).to_have_text(MANY["class_names"][2])
    expect(page.locator(".bars .name")).to_have_count(10)  # the most likely ones
    expect(page.locator(".bars .name.best")).to_have_text(MANY["class_names"][2])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_chosen_model_changes_the_classes_and_the_views(service: Service, open_page: Open) -> None:
    page = open_page(service, FIRST_VISIT, prepare=serve(DIGIT_MODEL, FEW_STEPS, COLOUR))
    wait_until_finished(page)
    heading, selector = page.locator("h1:visible"), page.get_by_role("combobox", name="Model")
    expect(heading).to_have_text("Generate a digit")
    assert page.locator("#label-keys label").all_text_contents() == DIGITS
    page.keyboard.press("4")
    selector.select_option("fast")  # the same classes, so the digit stays
    expect(page.get_by_role("radio", name="4")).to_be_checked()
    page.get_by_role("link", name="Draw").click()  # with the model that permits pictures
    expect(page.locator("#pad-digits button")).to_have_count(10)
    selector.select_option("pictures")
    expect(heading).to_have_text("Draw an image")
    expect(page.locator("#pad-digits")).to_be_hidden()
    expect(page.get_by_label("Pen colour")).to_be_visible()
    page.get_by_role("link", name="Generate").click()
    expect(heading).to_have_text("Generate an image")
    assert page.locator("#label-keys label").all_text_contents() == NAMES
    sent = requests_to(page, "/generate")
    page.locator("#generate-button").click()
    wait_until_finished(page)
    assert (sent[0]["label"], sent[0]["model"]) == (0, "pictures")
    page.reload()
    wait_until_finished(page)
    expect(selector).to_have_value("pictures")
    assert predictions(page)[0] == png_of(COLOUR, 0, 0)


def test_models_that_are_alike_are_offered_only_in_the_form(service: Service, open_page: Open) -> None:
    page = open_page(service, FIRST_VISIT, prepare=serve(DIGIT_MODEL, FEW_STEPS))
    wait_until_finished(page)
    expect(page.locator("#model")).to_be_hidden()
    page.locator("#advanced-button").click()
    sent = requests_to(page, "/generate")
    generate(page, model="fast")
    wait_until_finished(page)
    assert (sent[0]["label"], sent[0]["model"], sent[0]["num_steps"]) == (7, "fast", 4)
    page.get_by_role("button", name="Reset all fields").click()
    expect(page.locator('input[name="model"][value="default"]')).to_be_checked()


def test_forward_process_and_comparisons_use_the_classes_and_all_channels(
    service: Service, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("willReadFrequently")  # of this test, which reads a canvas often
    page = open_page(service, "#/understand", prepare=serve(COLOUR))
    expect(page.locator("#decided-run")).to_be_enabled()
    clean = pixels_on(page, "#forward-tiles canvas >> nth=0", 32)
    assert np.array_equal(clean, pixels_of(COLOUR, 0, 0))
    noisy = pixels_on(page, "#forward-tiles canvas >> nth=1", 32).astype(int)
    assert not np.array_equal(noisy[:, :, 0] - clean[0, 0, 0], noisy[:, :, 1] - clean[0, 0, 1])
    page.locator("#forward-label").select_option("lion")
    page.get_by_role("button", name="New image").click()
    expect(page.locator("#forward-new")).to_have_attribute("aria-disabled", "false")
    assert np.array_equal(pixels_on(page, "#forward-tiles canvas >> nth=0", 32), pixels_of(COLOUR, 15, 0))
    sent = requests_to(page, "/denoise")
    page.locator("#decided-run").click()
    expect(page.locator("#decided-result .legend")).to_contain_text("Thick line: probability of the class bee.")
    expect(page.locator("#decided-result .legend")).to_contain_text("each class has 5%")
    assert page.locator(".decided-rows > div").nth(3).locator("span").all_text_contents() == ["bee 90%"] * 14
    assert {body["model"] for body in sent} == {"pictures"}
    assert {(picture_in(body).size) for body in sent} == {(32, 32)}
    page.locator("#guidance-label").select_option("camel")
    sent = requests_to(page, "/generate")
    for part in ("guidance", "steps"):
        page.locator(f"#{part}-run").click()
        expect(page.locator(f"#{part}-run")).to_have_attribute("aria-disabled", "false")
    assert [body["label"] for body in sent] == [5] * 7 + [0] * 4


def test_drawing_and_opened_picture_keep_their_colours(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/draw", prepare=serve(COLOUR))
    page.get_by_label("Pen colour").fill("#ff0000")
    with page.expect_request("**/recognize") as request:
        draw(page)
    body = request.value.post_data_json
    assert (body["fit"], body["invert"], body["model"]) == ("resize", False, "pictures")
    assert picture_in(body).convert("RGB").getextrema() == ((0, 255), (0, 0), (0, 0))
    expect(verdict(page)).to_have_text("bee")
    photo = io.BytesIO()
    Image.new("RGB", (300, 200), (250, 120, 10)).save(photo, "PNG")  # light, but not inverted
    with page.expect_request("**/recognize") as request:
        drop(page, "photo.png", photo.getvalue())
    assert picture_in(request.value.post_data_json).convert("RGB").getpixel((16, 16)) == (250, 120, 10)
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Mark the lower half").click()
    with page.expect_request("**/inpaint*") as request:
        page.get_by_role("button", name="Fill in").click()
    mask = np.asarray(picture_in(request.value.post_data_json, "mask").convert("L"))
    assert np.array_equal(mask, np.repeat([0, 255], 16)[:, None].repeat(32, axis=1))
    wait_until_finished(page, "#inpaint-result")
    expect(page.locator("#inpaint-result").get_by_text("Class: bee")).to_be_visible()
    page.get_by_role("tab", name="Remove noise").click()
    page.get_by_role("button", name="Remove the noise").click()
    wait_until_finished(page, "#denoise-result")


def test_dropped_image_of_a_named_class_restores_its_parameters(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/draw", prepare=serve(DIGIT_MODEL, COLOUR))
    drop(page, "image.png", png_of(COLOUR, 19, 1))
    expect(page.locator("#provenance .facts")).to_contain_text("Classcafé")
    page.get_by_role("button", name="Generate again").click()
    wait_until_finished(page)
    assert "label=19&count=2&seed=5&" in page.url
    assert predictions(page) == [png_of(COLOUR, 19, index) for index in range(2)]


@pytest.mark.parametrize("served", [GREY, COLOUR, MANY], ids=lambda served: served["name"])
def test_mask_is_painted_in_the_pixels_of_the_model(service: Service, open_page: Open, served: dict[str, Any]) -> None:
    side = served["image_shape"][1]
    page = open_page(service, "#/draw", prepare=serve(served))
    draw(page)
    page.get_by_role("tab", name="Fill in").click()
    page.locator("#mask").press(" ")
    with page.expect_request("**/inpaint*") as request:
        page.get_by_role("button", name="Fill in").click()
    assert picture_in(request.value.post_data_json).size == (side, side)
    mask = np.asarray(picture_in(request.value.post_data_json, "mask").convert("L"))
    brush, middle = round(side / 14), side // 2
    expected = np.zeros((side, side), np.uint8)
    expected[middle - brush : middle + brush + 1, middle - brush : middle + brush + 1] = 255
    assert np.array_equal(mask, expected)


def test_sample_requests_name_classes_of_the_model(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/batch", prepare=serve(GREY))
    page.get_by_role("button", name="Send sample requests").click()
    wait_until_compared(page)
    assert page.locator(".lane h2").all_text_contents() == [
        "shirt, 24 images",
        "shoe, 8 images",
        "shoe, 4 images",
        "shoe, 1 image",
    ]


def test_model_without_picture_tasks_explains_what_is_missing(service: Service, open_page: Open) -> None:
    served = {**COLOUR, "has_picture_tasks": False}
    page = open_page(service, "#/draw", prepare=serve(served))
    expect(
        page.get_by_text("This model only generates images. It cannot recognise or change a picture.")
    ).to_be_visible()
    for part in ("#pad", "#draw-more", "[role=tablist]"):
        expect(page.locator(part)).to_be_hidden()
    page.get_by_role("link", name="Understand").click()
    expect(page.locator("#steps-run")).to_be_enabled()
    expect(page.locator("#decided")).to_be_hidden()
    assert np.array_equal(pixels_on(page, "#forward-tiles canvas >> nth=0", 32), pixels_of(COLOUR, 0, 0))


@pytest.mark.parametrize("view", ["generate", "understand", "draw", "batch", "status"])
def test_axe_finds_no_violation_and_nothing_is_cut_off(service: Service, open_page: Open, view: str) -> None:
    address = ADDRESS if view == "generate" else f"#/{view}"
    page = open_page(service, address, prepare=serve(COLOUR, MANY), reduced_motion="reduce")
    if view == "generate":
        wait_until_finished(page)
    if view == "understand":
        expect(page.locator("#decided-run")).to_be_enabled()
    if view == "draw":
        draw(page)
        expect(verdict(page)).to_have_text("bee")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for size in (DESKTOP, PHONE):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            results = Axe().run(page)
            assert results.violations_count == 0, f"{scheme} {size}\n{results.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size


def test_images_of_a_named_class_are_those_of_the_api(colour_service: Service, open_page: Open) -> None:
    body = {"label": 3, "count": 2, "seed": 42, "num_steps": 4, "sampler": "ddim", "guidance_scale": 1.5}
    page = open_page(colour_service, f"#/generate?{'&'.join(f'{name}={value}' for name, value in body.items())}")
    wait_until_finished(page)
    images = predictions(page)
    assert images == pngs(colour_service.post({**body, "model": "pictures"}))
    assert images == pngs(colour_service.post({**body, "label": NAMES[3]}))
    pixels, text, mode = open_png(images[0])
    assert (pixels.shape, mode, text["Label"]) == ((32, 32, 3), "RGB", NAMES[3])
    page.locator("#generate-stage button.tile").first.click()
    expect(page.locator("#detail .facts")).to_contain_text(f"Class{NAMES[3]}")


def test_images_of_the_new_model_replace_those_of_the_old_one(colour_service: Service, open_page: Open) -> None:
    page = open_page(colour_service, FIRST_VISIT)
    wait_until_finished(page)
    assert open_png(predictions(page)[0])[2] == "RGB"
    page.locator("#model").select_option("digits")
    expect(page.locator("#label-keys label")).to_have_count(10)
    wait_until_finished(page)
    assert open_png(predictions(page)[0])[2] == "L"


def test_tasks_of_a_colour_model_are_those_of_the_api(colour_service: Service, open_page: Open) -> None:
    page = open_page(colour_service, "#/draw")
    page.get_by_label("Pen colour").fill("#00ff00")
    with page.expect_response("**/recognize") as response:
        draw(page)
    expect(page.locator(".bars .name")).to_have_count(20)
    shown = [float(text.rstrip("%")) / 100 for text in page.locator(".bars .value").all_text_contents()]
    assert shown == pytest.approx(response.value.json()["probabilities"], abs=6e-4)
    page.get_by_role("tab", name="Redraw").click()
    page.get_by_role("button", name="Redraw").click()
    wait_until_finished(page, "#edit-result")
    assert open_png(predictions(page, "#edit-result")[0])[2] == "RGB"
    page.get_by_role("link", name="Understand").click()
    expect(page.locator("#decided-run")).to_be_enabled()
    with page.expect_response("**/denoise") as response:
        page.get_by_role("button", name="New noise").click()
    predicted = response.value.json()["images"][0]["png"]
    expect(page.locator("#forward-tiles img")).to_have_attribute("src", f"data:image/png;base64,{predicted}")
    assert open_png(base64.b64decode(predicted))[2] == "RGB"


def test_page_of_a_model_with_one_class_offers_no_class_and_no_recognition(service: Service, open_page: Open) -> None:
    page = open_page(service, FIRST_VISIT, prepare=serve(ONE_CLASS, COLOUR))
    wait_until_finished(page)
    expect(page.locator("#label-keys")).to_be_hidden()
    sent = requests_to(page, "/generate")
    page.locator("#generate-button").click()
    wait_until_finished(page)
    assert sent[0]["label"] == 0
    page.get_by_role("link", name="Draw").click()
    draw_seven(page)
    assert page.get_by_role("tab").all_text_contents() == ["Remove noise", "Fill in", "Redraw"]
    expect(page.get_by_role("tab", name="Remove noise")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Redraw").click()
    expect(page.locator("#edit-label")).to_be_hidden()
    page.get_by_role("link", name="Understand").click()
    expect(page.locator("#steps-run")).to_be_enabled()
    for part in ("#decided", "#forward-label", "#guidance-label", "#steps-label"):
        expect(page.locator(part)).to_be_hidden()
    page.locator("#model").select_option("pictures")
    expect(page.locator("#steps-label")).to_be_visible()
    page.get_by_role("link", name="Draw").click()
    expect(page.get_by_role("tab", name="Recognise")).to_be_visible()
