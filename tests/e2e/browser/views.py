"""Reads and operates the views of the page."""

import base64
import re

from playwright.sync_api import Locator, Page, expect

FINISHED = "The finished image"


def wait_until_finished(page: Page, root: str = "#generate-stage") -> None:
    """Waits until the run on the stage is finished."""
    expect(page.locator(root).get_by_text(FINISHED)).to_be_visible()


def wait_until_shown(page: Page, png: bytes, root: str = "#generate-stage") -> None:
    """Waits until the first image in the pane of x_0 is this PNG file."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    expect(page.locator(f"{root} button.tile img").first).to_have_attribute("src", source)


def wait_until_compared(page: Page) -> None:
    """Waits until the sample requests of the view Batch are measured in both ways."""
    expect(page.locator("#comparison-text")).to_contain_text(re.compile("it waits for|no request had to wait"))


def pngs_of(images: Locator) -> list[bytes]:
    """Returns the PNG files that img elements show."""
    return [
        base64.b64decode(source.removeprefix("data:image/png;base64,"))
        for source in images.evaluate_all("all => all.map((image) => image.src)")
    ]


def predictions(page: Page, root: str = "#generate-stage") -> list[bytes]:
    """Returns the files in the pane of x_0."""
    return pngs_of(page.locator(f"{root} button.tile img"))


def noisy(page: Page, root: str = "#generate-stage") -> list[bytes]:
    """Returns the files in the pane of x_t."""
    return pngs_of(page.locator(f"{root} div.tile img"))


def choose_more(page: Page, action: str, root: str = "#generate-stage") -> None:
    """Opens the menu More and chooses an action."""
    page.locator(f"{root} summary", has_text="More").click()
    page.locator(root).get_by_role("button", name=action).click()


def generate(page: Page, **fields: str) -> None:
    """Fills in the form and submits it."""
    if fields.keys() - {"label"} and page.locator("#advanced").is_hidden():
        page.locator("#advanced-button").click()
    for name, value in fields.items():
        if name in ("label", "sampler", "model", "quality"):
            page.locator(f'#generate-form input[name="{name}"][value="{value}"]').check(force=True)
        elif name in ("num_steps", "guidance_scale", "clip_guidance_scale"):
            page.locator(f'[name="{name}"]').evaluate(
                "(input, value) => { input.value = value;"
                " for (const kind of ['input', 'change']) input.dispatchEvent(new Event(kind, {bubbles: true})); }",
                value,
            )
        else:
            page.locator(f'#generate-form [name="{name}"]').fill(value)
    page.locator("#generate-button").click()
