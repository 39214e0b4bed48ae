"""The figures and the example network of docs/diffusers.md and of its benchmark."""

import json
import statistics

import pytest

from model.pipelines.folder import NETWORK, _check_network
from tests.docs.markdown import ROOT

DOCS = ROOT / "docs"
RESULTS = json.loads((DOCS / "results/benchmarks/zen5/pipeline.json").read_text())["rows"]
SERVERS = ("unfog", "pipeline-example", "pipeline-litserve")


@pytest.mark.parametrize(
    "load", ["one client with 1-step requests, 12 clients with 50-step requests", "arrivals, half with 1 step and half"]
)
@pytest.mark.parametrize(("kind", "percentile"), [("1 step", "p95"), ("50 steps", "p50")])
def test_table_of_the_benchmark_has_the_measured_figures(load: str, kind: str, percentile: str) -> None:
    shown = []
    for server in SERVERS:
        rows = [row for row in RESULTS if row["contestant"].startswith(server) and row["load"].startswith(load)]
        values = [row["latencies"][kind][percentile] for row in rows]
        assert len(values) == 3
        shown.append(f"{_digits(statistics.median(values))} s ({_digits(min(values))} - {_digits(max(values))})")
    lines = (DOCS / "benchmarks.md").read_text().splitlines()
    assert any(f"{kind}, {percentile} | {' | '.join(shown)} |" in line for line in lines), shown


def test_page_has_the_latencies_of_the_saturated_servers() -> None:
    text = (DOCS / "diffusers.md").read_text()
    for server in SERVERS:
        rows = [row for row in RESULTS if row["contestant"].startswith(server) and row["load"].startswith("one client")]
        assert f"{_digits(statistics.median(row['latencies']['1 step']['p95'] for row in rows))} s" in text


def test_saturated_servers_differ_as_the_page_says() -> None:
    def median(server: str, kind: str, percentile: str) -> float:
        rows = [row for row in RESULTS if row["contestant"].startswith(server) and row["load"].startswith("one client")]
        return statistics.median(row["latencies"][kind][percentile] for row in rows)

    for other in SERVERS[1:]:
        assert median(other, "1 step", "p95") > 8 * median("unfog", "1 step", "p95")
        assert median("unfog", "50 steps", "p50") < median(other, "50 steps", "p50") / 0.95


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("benchmarks/zen5/pipeline", "unfog runs 97% (83% - 116%) of the network steps that LitServe runs"),
        ("diffusers/pipeline-again", "gave 110% (80% - 160%)"),
        ("benchmarks/zen5/pipeline-two-rows", "unfog ran 93% (81% - 120%) of the network steps of LitServe"),
    ],
)
def test_page_has_the_share_of_the_network_steps_of_litserve(name: str, text: str) -> None:
    rows = json.loads((DOCS / f"results/{name}.json").read_text())["rows"]

    def num_steps(server: str) -> list[int]:
        counts = [row["latencies"] for row in rows if row["contestant"].startswith(server) and "12" in row["load"]]
        return [each["1 step"]["count"] + 50 * each["50 steps"]["count"] for each in counts]

    own, other = num_steps("unfog"), num_steps("pipeline-litserve")
    shares = [a / b for a, b in zip(own, other, strict=True)]
    assert f"{sum(own) / sum(other):.0%} ({min(shares):.0%} - {max(shares):.0%})" in text
    assert text in (DOCS / "benchmarks.md").read_text()


def test_table_of_differences_has_the_measured_values_within_the_promised_limits() -> None:
    text = (DOCS / "diffusers.md").read_text()
    for scheduler, variant, step, path, equal in json.loads((DOCS / "results/diffusers/parity.json").read_text()):
        assert f"| `{scheduler}` | {variant} | {_power(step)} | {_power(path)} | {equal:.2%} |" in text
        assert (step <= 1e-5, path <= 1e-4, equal >= 0.999) == (True, True, True)


def test_example_network_is_supported() -> None:
    path = DOCS / "results/diffusers/network.json"
    config = json.loads(path.read_text())
    assert config["_class_name"] == NETWORK
    assert _check_network(path, config) == ((3, 32, 32), 0)
    assert "--model_config_name_or_path docs/results/diffusers/network.json" in (DOCS / "diffusers.md").read_text()


def _digits(seconds: float) -> str:
    """Returns three significant digits, without an exponent."""
    return f"{seconds:#.3g}"


def _power(value: float) -> str:
    """Returns a value such as 2 · 10⁻⁷."""
    digit, _, exponent = f"{value:.0e}".partition("e")
    return f"{digit} · 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"
