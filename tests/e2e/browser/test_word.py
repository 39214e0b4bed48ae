"""The page with a model of letters: it writes a word, whose letters emerge at the same time."""

import json
import string
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from model.checkpoint import CheckpointConfig, save
from model.schedule import ScheduleConfig
from tests.e2e.browser.conftest import FIRST_VISIT, PHONE, Open
from tests.e2e.browser.test_draw import drop
from tests.e2e.browser.test_other_classes import requests_to
from tests.e2e.browser.views import choose_more, predictions, wait_until_finished
from tests.e2e.conftest import GUIDANCE, start_service
from tests.e2e.service import PNG, Service, open_png, pngs
from tests.tiny import tiny_unet

LEARNED = {"label_drop": 0.1}
ANNA = [0, 13, 13, 0]
ADDRESS = "#/generate?labels=0.13.13.0&seed=5&num_steps=4&model=letters"


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Service]:
    """A service with the models `letters`, which is the default and has the classes A to Z, and `digits`."""
    network = tiny_unet(seed=4, image_size=28, num_classes=26)
    path = tmp_path_factory.mktemp("letters") / "letters.safetensors"
    names = tuple(string.ascii_uppercase)
    config = CheckpointConfig(network.config, ScheduleConfig(), class_names=names, guidance=GUIDANCE, training=LEARNED)
    save(path, network, config)
    with ExitStack() as stack:
        yield start_service(stack, path, UNFOG_MODELS=f"letters={path},digits={checkpoint}", UNFOG_MAX_COUNT="20")


def columns(text: str) -> int:
    return int(text.partition("--columns:")[2].strip(" ;"))


def test_word_is_sent_in_one_request_and_its_letters_are_in_one_row(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, FIRST_VISIT)
    wait_until_finished(page)
    assert len(predictions(page)) == len("UNFOG")  # the first word
    expect(page.get_by_role("heading", level=1)).to_have_text("Generate a word")
    sent = requests_to(page, "/generate")
    page.get_by_role("textbox", name="Word").fill("Anna")
    page.locator("#generate-button").click()
    expect(page.get_by_role("button", name="N, image 2 of 4: details")).to_be_visible()
    (body,) = sent
    assert body["labels"] == ANNA and not {"label", "count"} & body.keys()
    assert columns(page.locator("#generate-stage .grid").last.get_attribute("style") or "") == 4
    assert predictions(page) == pngs(alphabet.post(body))
    expect(page.get_by_role("button", name="ANNA, 4 images")).to_be_visible()  # in the history
    expect(page.locator("#count")).to_be_hidden()


def test_link_to_a_word_generates_it_again(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, ADDRESS)
    wait_until_finished(page)
    body = {"labels": ANNA, "seed": 5, "num_steps": 4, "sampler": "ddpm", "model": "letters"}
    assert predictions(page) == pngs(alphabet.post(body))
    expect(page.get_by_role("textbox", name="Word")).to_have_value("ANNA")
    page.locator("#generate-stage button.tile").nth(2).click()
    expect(page.locator("#detail .facts")).to_contain_text("ClassN")


def test_panes_of_a_long_word_are_stacked(alphabet: Service, open_page: Open) -> None:
    for labels, is_long in (("0.1.2.3.4", False), ("0.1.2.3.4.5", True)):
        page = open_page(alphabet, ADDRESS.replace("0.13.13.0", labels))
        wait_until_finished(page)
        page.locator("#generate-stage input[type=range]").press("Home")
        noisy, clean = (page.locator("#generate-stage figure").nth(place).bounding_box() for place in (0, 1))
        assert noisy and clean
        assert (clean["y"] > noisy["y"]) is is_long


def test_link_to_one_letter_repeats_it(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, "#/generate?label=B&count=3&seed=5&num_steps=4&model=letters")
    wait_until_finished(page)
    expect(page.get_by_role("textbox", name="Word")).to_have_value("BBB")
    assert "labels=1.1.1" in page.url


@pytest.mark.parametrize(
    ("word", "problem"),
    [("AN7A", "The model has no class “7”."), ("  ", "Enter a word."), ("A" * 21, "Enter at most 20 letters.")],
)
def test_word_that_cannot_be_written_is_explained_and_not_sent(
    alphabet: Service, open_page: Open, word: str, problem: str
) -> None:
    page = open_page(alphabet, ADDRESS)
    wait_until_finished(page)
    sent = requests_to(page, "/generate")
    page.get_by_role("textbox", name="Word").fill(word)
    page.locator("#generate-button").click()
    expect(page.locator("#word-hint")).to_have_text(problem)
    page.get_by_role("textbox", name="Word").fill("A N")
    expect(page.locator("#word-hint")).not_to_have_class("hint error")
    assert sent == []


def test_word_is_saved_with_a_caption_and_as_a_row_in_an_animation(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, ADDRESS)
    wait_until_finished(page)
    with page.expect_download() as download:
        choose_more(page, "Picture with caption")
    assert download.value.suggested_filename == "ANNA-seed-5.png"
    pixels, text, _ = open_png(download.value.path().read_bytes())
    assert (json.loads(text["Label"]), text["Index"], text["Layout"]) == (list("ANNA"), "0-3", "rows")
    assert pixels.shape[1] == 4 * 28 * 8
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as animation").click()
    assert download.value.suggested_filename == "ANNA-seed-5.gif"


def test_changing_the_model_replaces_the_word_field_by_digits_and_back(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, ADDRESS)
    wait_until_finished(page)
    page.locator("#model").select_option("digits")
    expect(page.locator("#label-keys label").first).to_have_text("0")
    expect(page.locator("#generate-stage button.tile")).to_have_count(4)
    page.locator("#model").select_option("letters")
    expect(page.get_by_role("textbox", name="Word")).to_have_value("UNFOG")
    wait_until_finished(page)


def test_field_for_a_word_is_accessible_on_a_phone(alphabet: Service, open_page: Open) -> None:
    page = open_page(alphabet, ADDRESS, viewport=PHONE)
    wait_until_finished(page)
    assert Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("labels", [list("ANNA"), ["N"]])
def test_dropped_picture_of_a_word_can_be_generated_again(
    alphabet: Service, open_page: Open, labels: list[str]
) -> None:
    body = {"labels": labels, "seed": 5, "num_steps": 4}
    page = open_page(alphabet, "#/draw")
    expect(page.get_by_text("The result appears after each stroke.")).to_be_visible()
    drop(page, "word.png", alphabet.post(body, PNG).content)
    page.get_by_role("button", name="Generate again").click()
    wait_until_finished(page)
    assert predictions(page) == pngs(alphabet.post(body))
