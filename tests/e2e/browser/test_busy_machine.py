"""The page on a machine whose cores are used by other processes, as on a laptop. Needs an idle machine."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Response, expect

from model.spec import SHIPPED
from tests.e2e.browser.conftest import Open
from tests.e2e.browser.test_draw import draw_seven, verdict
from tests.e2e.browser.views import generate, wait_until_compared
from tests.e2e.busy_loops import busy_loops
from tests.e2e.conftest import start_service
from tests.e2e.service import Service

NUM_LOOPS = 2


@pytest.fixture
def shipped() -> Iterator[Service]:
    """A service with the shipped models and default settings. It stops after the pages are closed."""
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, OMP_NUM_THREADS="", UNFOG_NUM_THREADS="", UNFOG_COMPILE="auto")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_page_is_not_refused_while_64_images_and_other_processes_run(shipped: Service, open_page: Open) -> None:
    """Generates 64 images, and meanwhile draws a digit and sends the sample requests in another tab."""
    statuses: list[tuple[str, int]] = []

    def record(response: Response) -> None:
        statuses.append((response.url.rsplit("/", 1)[-1], response.status))

    with busy_loops(NUM_LOOPS):
        large = open_page(shipped, "#/generate", lambda page: page.on("response", record))
        generate(large, count="64")
        shipped.wait_until_running()
        other = open_page(shipped, "#/draw", lambda page: page.on("response", record))
        draw_seven(other)
        expect(verdict(other)).to_have_text("7")
        assert shipped.metrics().value("running_images") > 0  # the 64 images still run
        other.goto(f"{shipped.url}/#/batch")
        other.get_by_role("button", name="Send sample requests").click()
        expect(other.locator(".lane").first).to_be_visible()
        shipped.wait_until_idle()
        wait_until_compared(other)
    refused = [each for each in statuses if each[1] != 200 and each[1] != 304]
    assert refused == []
    assert sum(url.startswith("generate") for url, _ in statuses) == 1 + 1 + 2 * 4
    assert ("recognize", 200) in statuses
