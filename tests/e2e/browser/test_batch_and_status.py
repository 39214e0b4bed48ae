"""The views Batch and Status: the rows of the running requests, figures, charts and model cards."""

import json
from concurrent.futures import ThreadPoolExecutor

from playwright.sync_api import expect

from tests.e2e.browser.conftest import Open
from tests.e2e.conftest import Start
from tests.e2e.service import Service


def figures(page: object, root: str) -> dict[str, str]:
    return dict(
        page.locator(root).evaluate(  # type: ignore[attr-defined]
            "root => Array.from(root.children, (each) => [each.firstChild.textContent, each.lastChild.textContent])"
        )
    )


def test_rows_of_running_requests_are_shown_at_their_own_steps(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, "#/batch")
    expect(page.get_by_text("No image is running.")).to_be_visible()
    expect(page.locator("#batch-connection")).to_have_text("Live")
    with (
        service.events({"digit": 1, "count": 6, "num_steps": 100, "sampler": "ddim"}) as first,
        service.events({"digit": 2, "count": 3, "num_steps": 90}) as second,
    ):
        next(first), next(second)
        expect(page.locator(".lane")).to_have_count(2)
        expect(page.locator(".lane").nth(0)).to_contain_text("100 steps, ddim")
        expect(page.locator(".lane").nth(1)).to_contain_text("90 steps, ddpm")
        expect(page.locator(".cell.active").first).to_be_visible()
        assert 1 <= page.locator(".cell.active").count() <= 4  # UNFOG_MAX_BATCH
        list(first), list(second)
    expect(page.get_by_text("No image is running.")).to_be_visible()


def test_sample_requests_fill_the_batch(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/batch")
    expect(page.locator("#batch-connection")).to_have_text("Live")
    before = service.metrics().value("requests_total", route="/generate", code="200")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator(".lane").first).to_be_visible()
    service.wait_until_idle()
    expect(page.get_by_text("No image is running.")).to_be_visible()
    assert service.metrics().value("requests_total", route="/generate", code="200") == before + 5  # no model `fast`


def test_leaving_the_view_closes_the_stream(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/batch")
    expect(page.locator("#batch-connection")).to_have_text("Live")
    before = service.metrics().value("requests_total", route="/events/batch", code="200")
    page.get_by_role("link", name="Status").click()
    service.wait_for(before + 1, "requests_total", route="/events/batch", code="200")


def test_status_shows_the_health_the_models_and_the_throughput(service: Service, open_page: Open) -> None:
    page = open_page(service, "#/status")
    health = service.client.get("/health").json()
    expect(page.locator("#status-figures")).to_contain_text(health["device"])
    expect(page.locator("#model-cards")).to_contain_text(health["model"]["sha256"])
    expect(page.locator("#model-cards")).to_contain_text(f"{health['model']['num_parameters']:,}")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda seed: service.images(digit=1, seed=seed, num_steps=5), range(8)))
    expect(page.locator("#latency-chart")).to_contain_text("Median of the newest requests")
    expect(page.locator("#throughput-chart .series")).to_have_count(1)
    assert json.dumps(figures(page, "#status-figures")).count("ok") == 1
