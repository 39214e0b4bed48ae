"""Batches in the view Status: progress, cancelling, downloads, and when the page asks for them.

Most tests answer the requests for batches themselves, so that they choose the state. The last ones use the service.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest
from axe_playwright_python.sync_playwright import Axe
from openai import OpenAI
from playwright.sync_api import Locator, Page, Route, expect

from tests.e2e.browser.conftest import DESKTOP, PHONE, Open, Watched
from tests.e2e.conftest import Start
from tests.e2e.process import wait_until
from tests.e2e.service import Service

STATUS = "#/status"
ENDPOINT: Final = "/v1/images/generations"
KEY, KEY_NAME = "the-key-of-this-test", "unfog-api-key"
LONGER = 20_000  # milliseconds of the page's clock, in which it would ask for unfinished batches several times
SAMPLE = 6_000  # milliseconds of the page's clock, in which it takes a sample of the metrics
HIDE = """hidden => {
  Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
  document.dispatchEvent(new Event("visibilitychange"));
}"""
REFUSED = {
    401: ("unauthorized", "This service accepts only requests with an API key"),
    409: ("conflict", "The batch has ended with the status completed"),
    503: ("storage_unavailable", "The database of files and batches does not answer"),
    507: ("storage_full", "The storage of files and results is full. Tell the operator, or retry later"),
}


def batch(status: str = "in_progress", number: int = 1, **fields: Any) -> dict[str, Any]:
    """Returns a batch as the service describes it. Only the fields that the page reads differ."""
    return {
        "id": f"batch_{number:024x}",
        "object": "batch",
        "endpoint": ENDPOINT,
        "status": status,
        "created_at": 1_790_000_000 - number,
        "request_counts": {"total": 10_000, "completed": 1_222, "failed": 12},
        "metadata": None,
        "images": 4_888,
        "images_per_second": 51.26,
        "seconds_left": 1_500.0,
        "output_file_id": None,
        "error_file_id": None,
        "errors": None,
        **fields,
    }


def ended(status: str = "completed", **fields: Any) -> dict[str, Any]:
    """Returns a batch all of whose lines have a result."""
    counts = {"total": 10_000, "completed": 9_988, "failed": 12}
    facts = {"images": 39_952, "images_per_second": None, "seconds_left": None}
    files = {"output_file_id": "file-output", "error_file_id": "file-error"}
    return batch(status, **{"request_counts": counts, **facts, **files, **fields})


class Batches:
    """Answers the requests of the page for batches."""

    def __init__(self, *batches: dict[str, Any], has_more: bool = False) -> None:
        self.batches, self.has_more = list(batches), has_more
        self.refusals: dict[str, int] = {}  # the end of a path -> the status of an error
        self.lists = 0  # requests for the list
        self.posts: list[str] = []
        self.keys: list[str | None] = []  # the header Authorization of each request

    def prepare(self, page: Page) -> None:
        page.clock.install()
        page.route(re.compile(r"/v1/batches|/v1/files|/batches/.*zip"), self.answer)

    def answer(self, route: Route) -> None:
        request = route.request
        path = request.url.partition("?")[0]
        self.keys.append(request.headers.get("authorization"))
        self.lists += path.endswith("/batches")
        if request.method == "POST":
            self.posts.append(path)
        status = next((status for end, status in self.refusals.items() if path.endswith(end)), None)
        if status:
            code, message = REFUSED[status]
            error = {"message": message, "type": "server_error", "param": None, "code": code}
            route.fulfill(status=status, json={"error": error})
        elif path.endswith(("/content", ".zip")):
            route.fulfill(body=f"content of {path.rpartition('v1/')[2]}")
        elif path.endswith("/cancel"):
            self.batches = [{**each, "status": "cancelling"} for each in self.batches]
            route.fulfill(json=self.batches[0])
        else:
            assert request.url.endswith("?limit=20")
            route.fulfill(json={"object": "list", "data": self.batches, "has_more": self.has_more})


def items(page: Page) -> Locator:
    return page.locator("#batch-list > li")


def button(page: Page, name: str) -> Locator:
    return page.locator("#batch-list").get_by_role("button", name=name)


def wait_for_list(page: Page, batches: Batches) -> None:
    """Moves the clock of the page until it has asked for the batches again."""
    before = batches.lists

    def has_asked() -> bool:
        page.clock.run_for(1000)
        return batches.lists > before

    wait_until(has_asked, "the page asks for the batches")


def test_page_without_batches_says_how_to_create_one(service: Service, open_page: Open) -> None:
    page = open_page(service, STATUS, Batches().prepare)
    expect(page.locator("#no-batches")).to_have_text(re.compile(r"^No batches\. POST /v1/batches creates one"))
    expect(page.locator("#batches")).to_be_hidden()
    page.locator("#no-batches a").click()
    expect(page.locator("#operations-Batches-create_batch")).to_be_visible()


def test_running_batch_shows_its_lines_speed_and_time_left(service: Service, open_page: Open) -> None:
    page = open_page(service, STATUS, Batches(batch(metadata={"set": "digits"})).prepare)
    expect(items(page)).to_have_count(1)
    text = "1,234 of 10,000 lines, 12 failed, 4,888 images, 51.3 images per second, about 25 min left"
    expect(items(page).get_by_text(text, exact=True)).to_be_visible()
    expect(items(page).get_by_role("heading")).to_have_text(ENDPOINT)
    expect(items(page)).to_contain_text("Running")
    expect(items(page)).to_contain_text("set: digits")
    bar = page.get_by_role("progressbar", name="Answered lines")
    assert bar.evaluate("bar => bar.position") == pytest.approx(1_234 / 10_000)
    expect(page.locator("#no-batches")).to_be_hidden()


def test_batch_without_answers_shows_no_speed_and_no_time(service: Service, open_page: Open) -> None:
    unknown: dict[str, Any] = {"images": 0, "images_per_second": None, "seconds_left": None}
    counts = {"total": 1, "completed": 0, "failed": 0}
    validating = batch("validating", 2, request_counts={**counts, "total": 0}, **unknown)
    page = open_page(service, STATUS, Batches(batch(request_counts=counts, **unknown), validating).prepare)
    expect(items(page).first.get_by_text("0 of 1 line", exact=True)).to_be_visible()
    expect(items(page).last).to_contain_text("Checking the file")
    expect(items(page).last).not_to_contain_text(" of ")


def test_unfinished_batch_is_requested_until_it_ends(service: Service, open_page: Open) -> None:
    batches = Batches(batch())
    page = open_page(service, STATUS, batches.prepare)
    expect(items(page)).to_contain_text("Running")
    batches.batches = [batch("finalizing")]
    wait_for_list(page, batches)
    expect(items(page)).to_contain_text("Storing the results")
    batches.batches = [ended()]
    wait_for_list(page, batches)
    expect(items(page)).to_contain_text("Completed")
    expect(items(page).get_by_text("10,000 of 10,000 lines, 12 failed, 39,952 images", exact=True)).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_count(0)
    expect(page.locator("#live")).to_contain_text("Batch, Completed")
    page.clock.run_for(SAMPLE)  # The first sample of the metrics may cause one more request.
    before = batches.lists
    page.clock.run_for(LONGER)
    assert batches.lists == before


@pytest.mark.parametrize("is_left", [True, False], ids=["left", "hidden"])
def test_view_that_is_not_visible_requests_no_batches(service: Service, open_page: Open, *, is_left: bool) -> None:
    batches = Batches(batch())
    page = open_page(service, STATUS, batches.prepare)
    expect(items(page)).to_contain_text("Running")
    if is_left:
        page.get_by_role("link", name="Understand").click()
        expect(page.locator("#understand")).to_be_visible()
    else:
        page.evaluate(HIDE, True)
        page.clock.run_for(SAMPLE)  # A request that has begun ends.
    before = batches.lists
    page.clock.run_for(LONGER)
    assert batches.lists == before
    batches.batches = [ended()]
    if is_left:
        page.get_by_role("link", name="Status").click()
    else:
        page.evaluate(HIDE, False)
    expect(items(page)).to_contain_text("Completed")


def test_new_batch_is_shown_above_the_others_and_does_not_take_the_focus(service: Service, open_page: Open) -> None:
    batches = Batches(batch(number=2))
    page = open_page(service, STATUS, batches.prepare)
    button(page, "Cancel").focus()
    batches.batches = [batch("validating", 1), batch(number=2)]
    wait_for_list(page, batches)
    expect(items(page)).to_have_count(2)
    expect(items(page).first).to_contain_text("Checking the file")
    expect(button(page, "Cancel").last).to_be_focused()
    batches.batches = [batch("validating", 1)]
    wait_for_list(page, batches)
    expect(items(page)).to_have_count(1)


def test_only_the_newest_batches_are_shown(service: Service, open_page: Open) -> None:
    batches = [ended(number=number) for number in range(1, 21)]
    page = open_page(service, STATUS, Batches(*batches, has_more=True).prepare)
    expect(items(page)).to_have_count(20)
    expect(page.get_by_text("Only the newest 20 batches are shown.")).to_be_visible()


def test_cancel_is_sent_once_and_the_focus_stays(service: Service, open_page: Open) -> None:
    batches = Batches(batch())
    page = open_page(service, STATUS, batches.prepare)
    button(page, "Cancel").press("Enter")
    expect(items(page)).to_contain_text("Cancelling")
    expect(button(page, "Cancel")).to_be_focused()
    expect(button(page, "Cancel")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Enter")
    wait_for_list(page, batches)
    assert batches.posts == [f"{service.url}/v1/batches/{batch()['id']}/cancel"]
    batches.batches = [ended("cancelled")]
    wait_for_list(page, batches)
    expect(items(page)).to_contain_text("Cancelled")
    text = "9,988 of 10,000 lines, 12 failed or not answered, 39,952 images"
    expect(items(page).get_by_text(text, exact=True)).to_be_visible()
    expect(button(page, "Cancel")).to_have_count(0)
    expect(items(page).get_by_role("link", name="Results")).to_be_focused()


def test_refused_cancel_says_why_and_can_be_repeated(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected += ["507", "409"]
    batches = Batches(batch())
    batches.refusals = {"/cancel": 507}
    page = open_page(service, STATUS, batches.prepare)
    button(page, "Cancel").click()
    expect(items(page).locator(".error")).to_contain_text(["The storage of files and results is full."])
    expect(button(page, "Cancel")).to_have_attribute("aria-disabled", "false")
    batches.refusals, batches.batches = {"/cancel": 409}, [ended()]  # it ends before the request arrives
    button(page, "Cancel").click()
    expect(items(page)).to_contain_text("Completed")
    expect(items(page).locator(".error:visible")).to_have_count(0)


def test_failed_batch_shows_its_first_errors(service: Service, open_page: Open) -> None:
    data = [
        {"code": "invalid_json", "line": 1_000 + number, "message": f"Error {number}", "param": None}
        for number in range(5)
    ]
    counts = {"total": 0, "completed": 0, "failed": 0}
    failed = batch("failed", request_counts=counts, images=0, errors={"object": "list", "data": data})
    page = open_page(service, STATUS, Batches(failed).prepare)
    expect(items(page)).to_contain_text("Failed")
    texts = ["Line 1,000: Error 0.", "Line 1,001: Error 1.", "Line 1,002: Error 2.", "And 2 more."]
    expect(items(page).get_by_role("listitem")).to_have_text(texts)
    expect(items(page).get_by_role("link")).to_have_count(0)


def test_texts_of_a_batch_are_not_html(service: Service, open_page: Open) -> None:
    html = "<img src=x onerror=alert(1)>"
    page = open_page(service, STATUS, Batches(batch(metadata={html: html})).prepare)
    expect(items(page)).to_contain_text(f"{html}: {html}")


def test_results_are_links_without_an_api_key(service: Service, open_page: Open) -> None:
    plain = ended(number=2, images=0, error_file_id=None)
    page = open_page(service, STATUS, Batches(ended(), plain).prepare)
    batch_id = ended()["id"]
    targets = {
        "Results": ("v1/files/file-output/content", f"{batch_id}_output.jsonl"),
        "Images (ZIP)": (f"batches/{batch_id}/images.zip", f"{batch_id}.zip"),
        "Errors": ("v1/files/file-error/content", f"{batch_id}_error.jsonl"),
    }
    links = items(page).first.get_by_role("link")
    expect(links).to_have_text(list(targets))
    for link in links.all():
        found = link.get_attribute("href"), link.get_attribute("download")
        assert found == targets[link.text_content() or ""]
    expect(items(page).last.get_by_role("link")).to_have_text(["Results"])


def test_results_are_requested_with_the_api_key(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("503")
    batches = Batches(ended())

    def prepare(page: Page) -> None:
        page.add_init_script(f"sessionStorage.setItem({json.dumps(KEY_NAME)}, {json.dumps(KEY)})")
        batches.prepare(page)

    page = open_page(service, STATUS, prepare)
    with page.expect_download() as download:
        button(page, "Results").press("Enter")
    assert download.value.suggested_filename == f"{ended()['id']}_output.jsonl"
    assert Path(download.value.path()).read_text() == "content of files/file-output/content"
    expect(button(page, "Results")).to_be_focused()
    assert set(batches.keys) == {f"Bearer {KEY}"}
    batches.refusals = {"/images.zip": 503}
    button(page, "Images (ZIP)").click()
    expect(items(page).locator(".error")).to_contain_text(["The database does not answer."])


def test_failure_of_the_list_is_shown_until_it_is_answered(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("503")
    batches = Batches(batch())
    batches.refusals = {"/batches": 503}
    page = open_page(service, STATUS, batches.prepare)
    expect(page.locator("#batches-problem")).to_have_text(
        "The database does not answer. Batches continue when it answers again. The page tries again."
    )
    batches.refusals = {}
    wait_for_list(page, batches)
    expect(items(page)).to_contain_text("Running")
    expect(page.locator("#batches-problem")).to_have_text("")


def test_key_is_not_asked_for_again_until_the_view_is_opened(
    service: Service, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("401")
    batches = Batches(batch())
    batches.refusals = {"/batches": 401}
    page = open_page(service, STATUS, batches.prepare)
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#batches-problem")).to_contain_text("Open the view again to enter a key.")
    page.clock.run_for(LONGER)
    assert batches.lists == 1
    expect(page.locator("#key-dialog")).to_be_hidden()


def test_axe_finds_no_violation_in_a_list_of_batches(service: Service, open_page: Open) -> None:
    error = {"code": "invalid_json", "line": 3, "message": "The line is not valid JSON in UTF-8", "param": None}
    failed = batch("failed", 4, errors={"object": "list", "data": [error]})
    batches = [batch(), ended(number=2, metadata={"a" * 64: "b" * 512}), batch("cancelling", 3), failed]
    page = open_page(service, STATUS, Batches(*batches, has_more=True).prepare, reduced_motion="reduce")
    expect(items(page)).to_have_count(4)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size in (DESKTOP, PHONE):
            page.set_viewport_size(size)  # type: ignore[arg-type]
            results = Axe().run(page)
            assert results.violations_count == 0, f"{scheme} {size}\n{results.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), size


def test_batch_of_a_client_appears_and_its_results_can_be_downloaded(
    start: Start, open_page: Open, tmp_path: Path
) -> None:
    service = start(UNFOG_DATA_DIR=str(tmp_path), UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, STATUS)
    expect(page.locator("#no-batches")).to_be_visible()
    bodies = [{"prompt": f"digit {number % 10}", "n": 2, "response_format": "b64_json"} for number in range(20)]
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}
        for number, body in enumerate(bodies)
    ]
    client = OpenAI(base_url=f"{service.url}/v1", api_key="none")
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    file = client.files.create(file=("digits.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    expect(items(page)).to_contain_text("Completed")
    expect(items(page).get_by_text("20 of 20 lines, 40 images", exact=True)).to_be_visible()
    with page.expect_download() as results:
        items(page).get_by_role("link", name="Results").click()
    output = client.batches.retrieve(made.id).output_file_id or ""
    text = Path(results.value.path()).read_text()
    assert text == client.files.content(output).text
    assert {json.loads(line)["custom_id"] for line in text.splitlines()} == {line["custom_id"] for line in lines}
    with page.expect_download() as images:
        items(page).get_by_role("link", name="Images (ZIP)").click()
    with zipfile.ZipFile(io.BytesIO(Path(images.value.path()).read_bytes())) as archive:
        assert archive.testzip() is None
        assert sum(name.endswith(".png") for name in archive.namelist()) == 40
