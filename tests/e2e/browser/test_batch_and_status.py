"""The views Batch and Status: the rows of the running requests, figures, charts and model cards."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from tests.e2e.browser.conftest import Open, Watched
from tests.e2e.browser.views import pngs_of, wait_until_compared
from tests.e2e.conftest import Start
from tests.e2e.service import Service, pngs

REQUESTS = """performance.getEntriesByType("resource").filter(({ name }) => name.includes("/generate?"))
  .map(({ startTime, responseEnd }) => [startTime, responseEnd])"""


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


def test_finished_images_of_other_clients_show_their_last_step(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, "#/batch")
    expect(page.locator("#batch-connection")).to_have_text("Live")
    # Enough images that the request runs for seconds: the page shows its finished images until shortly after its end.
    with service.events({"digit": 2, "count": 48, "num_steps": 60}) as events:
        next(events)
        expect(page.locator(".cell.done").first).to_have_text("60")
        assert page.locator(".lane img[src]").count() == 0  # pictures of other clients are not shown
        list(events)
    expect(page.get_by_text("No image is running.")).to_be_visible()


def test_sample_requests_show_waiting_running_and_finished_images_like_those_of_the_api(
    start: Start, open_page: Open
) -> None:
    service = start(UNFOG_MAX_BATCH="16", UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, "#/batch")
    bodies: list[dict[str, object]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.get_by_role("button", name="Send sample requests").click()
    first = page.locator(".lane").first
    expect(first.locator(".cell")).to_have_count(24)
    expect(first.locator(".cell", has_text="waits").first).to_be_visible()
    expect(first.locator(".cell.active").first).to_be_visible()
    expect(page.locator(".lane")).to_have_count(4)
    expect(page.locator(".cell.done")).to_have_count(24 + 8 + 4 + 1)
    assert first.locator(".cell").all_text_contents() == ["100"] * 24
    expect(first).to_contain_text("100 steps, ddpm, finished")
    wait_until_compared(page)
    assert len(bodies) == 8
    assert bodies[:4] == bodies[4:]  # the same requests, in the same order
    lanes = page.locator(".lane").all()[
        :4
    ]  # Further ones can follow for a moment: of the requests one after the other.
    for lane, body in zip(lanes, bodies[:4], strict=True):
        assert pngs_of(lane.locator("img")) == pngs(service.post(body))


@pytest.mark.slow
def test_comparison_draws_the_times_of_both_measurements(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, "#/batch")
    page.get_by_role("button", name="Send sample requests").click()
    wait_until_compared(page)
    sent = page.evaluate(REQUESTS)
    assert len(sent) == 8
    alone_sent = sent[4:]
    for (begin, end), (next_begin, _) in pairwise(alone_sent):
        assert next_begin > end - 0.1 * (end - begin)  # one after the other
    boxes = {
        kind: [bar.bounding_box() or {} for bar in page.locator(f"#comparison-rows .{kind}").all()]
        for kind in ("shared", "waiting", "alone")
    }
    assert [len(each) for each in boxes.values()] == [4, 4, 4]
    scale = [box["width"] for box in boxes["alone"]]
    seconds = [end - begin for begin, end in alone_sent]
    assert [each / sum(scale) for each in scale] == pytest.approx([each / sum(seconds) for each in seconds], abs=0.1)
    for shared, waiting, alone in zip(*boxes.values(), strict=True):
        assert waiting["x"] == pytest.approx(shared["x"], abs=1)  # both begin when the request arrives
        assert alone["x"] == pytest.approx(waiting["x"] + waiting["width"], abs=3)
    ends = [box["x"] + box["width"] for box in boxes["alone"]]
    assert ends == sorted(ends)


@pytest.mark.slow
def test_refused_sample_request_is_sent_again_after_retry_after(
    start: Start, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("429")
    service = start(UNFOG_RATE_LIMIT="4/3 second", UNFOG_MAX_BATCH="64")
    page = open_page(service, "#/batch")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.get_by_text("A request will be sent again in")).to_be_visible()
    wait_until_compared(page)
    expect(page.locator("#batch-problem")).to_have_text("")
    expect(page.locator(".cell.done")).to_have_count(24 + 8 + 4 + 1)


@pytest.mark.slow
def test_long_retry_after_ends_the_sample_requests_with_a_reason(
    start: Start, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("429")
    page = open_page(start(UNFOG_RATE_LIMIT="3/hour", UNFOG_MAX_BATCH="64"), "#/batch")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator("#batch-problem")).to_contain_text("Too many requests")
    expect(page.locator("#batch-send")).to_have_attribute("aria-disabled", "false")
    expect(page.get_by_text("The comparison was stopped before its end.")).to_be_visible()


def test_leaving_the_view_ends_a_wait_for_a_busy_service(service: Service, open_page: Open, watched: Watched) -> None:
    watched.expected.append("429")
    busy = {"status": 429, "code": "overloaded", "detail": "The queue is full"}
    page = open_page(service, "#/batch")
    page.route("**/generate?*", lambda route: route.fulfill(status=429, headers={"Retry-After": "100"}, json=busy))
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.get_by_text("A request will be sent again in 100 seconds.")).to_be_visible()
    page.get_by_role("link", name="Status").click()
    page.get_by_role("link", name="Batch").click()
    expect(page.locator("#batch-send")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#batch-problem")).to_have_text("")


def test_failed_sample_request_stops_the_others_and_marks_no_cell(
    start: Start, open_page: Open, watched: Watched
) -> None:
    watched.expected.append("503")
    problem = {"status": 503, "code": "draining", "detail": "Draining"}
    page = open_page(start(UNFOG_MAX_BATCH="4", UNFOG_REQUEST_TIMEOUT="300"), "#/batch")

    def answer(route: Route) -> None:
        if route.request.post_data_json["label"] == 7:  # the last one
            route.fulfill(status=503, json=problem)
        else:
            route.continue_()

    page.route("**/generate?*", answer)
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator("#batch-problem")).to_contain_text("The service is stopping")
    expect(page.locator(".lane").last.locator("p")).to_have_text("failed")
    expect(page.locator(".lane").first.locator("p")).to_contain_text("cancelled")
    expect(page.locator(".cell.active")).to_have_count(0)
    expect(page.get_by_text("The comparison was stopped before its end.")).to_be_visible()


@pytest.mark.slow
def test_comparison_without_waits_says_so(start: Start, fast_checkpoint: Path, open_page: Open) -> None:
    page = open_page(start(UNFOG_CHECKPOINT=str(fast_checkpoint), UNFOG_MAX_COUNT="1"), "#/batch")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator("#comparison-text")).to_contain_text("answered")
    waits = [bar.bounding_box() or {} for bar in page.locator("#comparison-rows .waiting").all()]
    has_waited = any(box["width"] > 3 for box in waits)
    text = page.locator("#comparison-text").text_content() or ""
    assert ("no request had to wait" in text) != has_waited


@pytest.mark.slow
def test_leaving_the_view_cancels_the_sample_requests(start: Start, open_page: Open) -> None:
    service = start(UNFOG_MAX_BATCH="1", UNFOG_REQUEST_TIMEOUT="300")
    page = open_page(service, "#/batch")
    page.get_by_role("button", name="Send sample requests").click()
    expect(page.locator(".lane")).to_have_count(4)
    page.get_by_role("link", name="Status").click()
    service.wait_until_idle()
    page.get_by_role("link", name="Batch").click()
    expect(page.get_by_role("button", name="Send sample requests")).to_be_enabled()
    expect(page.locator("#batch-problem")).to_have_text("")
    expect(page.locator(".lane").first).to_contain_text("cancelled")
    expect(page.get_by_text("The comparison was stopped before its end.")).to_be_visible()
    expect(page.locator(".cell.active")).to_have_count(0)


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
