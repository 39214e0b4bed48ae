"""Takes the pictures of the page for the documents: `python -m tests.e2e.browser.screenshots URL FOLDER [NAME ...]`.

URL is a running service with the shipped models and CLIP, and without batches. With names, such as `batches`, takes
only these pictures. Needs Chromium and the development extras.
"""

import io
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from openai import OpenAI
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.batch_client import GENERATIONS, drawings, jsonl
from tests.e2e.browser.conftest import DESKTOP, arguments, program
from tests.e2e.browser.views import wait_until_finished

SMALL = {"width": 1120, "height": 740}
RUN = "#/generate?label=7&count=9&seed=42&num_steps=100&sampler=ddpm&guidance_scale=3&model=default"
WIDTH = 896  # of the animated picture, in pixels
FRAME_MS, LAST_MS, STEPS_A_FRAME = 120, 2500, 4


def generate(page: Page) -> None:
    wait_until_scored(page)
    slider = page.get_by_role("slider", name="Step", exact=True)
    slider.focus()
    for _ in range(45):
        page.keyboard.press("ArrowLeft")


def wait_until_scored(page: Page) -> None:
    """Waits until the images of the run are finished and their similarities are shown."""
    wait_until_finished(page)
    expect(page.locator("#generate-stage .explanation")).to_be_visible()


def understand(page: Page) -> None:
    for name in ("#decided-run", "#guidance-run", "#steps-run"):
        expect(page.locator(name)).to_be_enabled()
        page.locator(name).click()
        expect(page.locator(name)).to_be_enabled()


def draw(page: Page) -> None:
    page.locator("#pad-digits").get_by_role("button", name="Digit 4").click()
    page.get_by_role("tab", name="Fill in").click()
    page.get_by_role("button", name="Mark the lower half").click()
    page.get_by_role("button", name="Fill in").click()
    wait_until_finished(page, "#inpaint-result")


def batch(page: Page) -> None:
    expect(page.locator("#batch-connection")).to_have_text("Live")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator(".lane")).to_have_count(4)
    expect(page.locator(".lane").last.locator("img[src]")).to_be_visible()


def status(page: Page) -> None:
    expect(page.locator("#model-cards .facts").first).to_be_visible()
    for digit in range(8):
        page.evaluate(
            "(digit) => fetch('generate', {method: 'POST', headers: {'Content-Type': 'application/json'},"
            " body: JSON.stringify({digit, count: 4 + 2 * digit})}).then((response) => response.text())",
            digit,
        )
        page.wait_for_timeout(4000)


def batches(page: Page) -> None:
    """Creates two batches, and waits until the smaller one has ended."""
    client = OpenAI(base_url=f"{page.url.partition('#')[0]}v1", api_key="none")
    for name, count in (("1,000 digits", 100), ("One of each digit", 10)):
        file = client.files.create(file=("digits.jsonl", jsonl(drawings(count, n=10))), purpose="batch")
        client.batches.create(
            input_file_id=file.id, endpoint=GENERATIONS, completion_window="24h", metadata={"name": name}
        )
    expect(page.locator("#batch-list > li").first).to_contain_text("Completed", timeout=120_000)
    page.locator("#batches").scroll_into_view_if_needed()


VIEWS: dict[str, tuple[str, str, Callable[[Page], None]]] = {
    "generate": (RUN, "dark", generate),
    "understand": ("#/understand", "light", understand),
    "draw": ("#/draw", "light", draw),
    "batch": ("#/batch", "dark", batch),
    "status": ("#/status", "light", status),
    "batches": ("#/status", "light", batches),
}
PARTS = {"batches": "#batches"}  # the part of the view that the picture shows


def open_view(browser: Browser, url: str, hash_: str, scheme: str, size: dict[str, int]) -> Page:
    page = browser.new_context(color_scheme=scheme, viewport=size).new_page()  # type: ignore[arg-type]
    page.goto(f"{url}/{hash_}")
    return page


def picture_of(page: Page, *, full_page: bool = False, part: str | None = None) -> Image.Image:
    shot = page.locator(part).screenshot() if part else page.screenshot(full_page=full_page)
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main(url: str, folder: Path, names: Collection[str]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=arguments())
        for name, (hash_, scheme, prepare) in VIEWS.items():
            if names and name not in names:
                continue
            page = open_view(browser, url, hash_, scheme, DESKTOP)
            prepare(page)
            picture = picture_of(page, full_page=name == "understand", part=PARTS.get(name))
            picture.save(folder / f"page-{name}.webp", quality=85, method=6)
        if names:
            return
        frames = animation(open_view(browser, url, RUN, "dark", SMALL))
        times = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
        path = folder / "page.webp"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=60, method=6)


def animation(page: Page) -> list[Image.Image]:
    """Returns the frames of a run, from its first step to the finished images."""
    wait_until_scored(page)
    page.get_by_role("slider", name="Step", exact=True).focus()
    page.keyboard.press("Home")
    frames = [picture_of(page)]
    for _ in range(100 // STEPS_A_FRAME):
        for _ in range(STEPS_A_FRAME):
            page.keyboard.press("ArrowRight")
        frames.append(picture_of(page))
    height = round(SMALL["height"] * WIDTH / SMALL["width"])
    return [frame.resize((WIDTH, height), Image.Resampling.LANCZOS) for frame in frames]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
