"""Tests of the arithmetic of machines and costs, with round values computed by hand."""

import json
import shutil
from pathlib import Path

import pytest

from scripts import bench
from scripts.benchmark.scaling import (
    break_even,
    bytes_of_image,
    cores,
    figure,
    gpus,
    inputs_in,
    process_rate,
    tables_of,
)
from tests.docs.markdown import ROOT

VALUES = {
    "load": 0.5,
    "images_per_request": 4.0,
    "images_per_core_default": 10.0,
    "images_per_core_fast": 200.0,
    "cores_per_replica": 2.0,
    "process_requests_of_1": 1000.0,  # 1 ms
    "process_images_of_64": 64000 / 7.3,  # 7.3 ms for 64 images: 1 ms, and 0.1 ms for each further image
    "gpu_images_low": 1000.0,
    "gpu_images_high": 50_000.0,
    "price_core": 0.036,
    "price_gpu": 3.6,
    "price_gigabyte": 0.1,
    "bytes_head": 400.0,
    "bytes_png": 600.0,
    "bytes_events": 1000.0,
    "bytes_preview": 700.0,
    "previews": 10.0,
    "haproxy_seconds": 0.0001,
    "ray_proxy_seconds": 0.004,
    "redis_requests": 50_000.0,
    "images_per_line": 10.0,
    "postgres_lines": 2000.0,
    "series_per_replica": 100.0,
    "prometheus_series": 100_000.0,
}
INPUTS = {
    name: {"name": name, "value": value, "unit": "", "kind": "assumption", "source": ""}
    for name, value in VALUES.items()
}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00412, "0.0041"),
        (0.5, "0.5"),
        (2, "2"),
        (3.14, "3.1"),
        (12.4, "12"),
        (99.6, "100"),
        (12345, "12,000"),
    ],
)
def test_figure_has_two_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_process_rate_follows_from_requests_of_one_and_of_64_images() -> None:
    assert process_rate(VALUES) == pytest.approx(4 / 1.3e-3)
    assert process_rate({**VALUES, "images_per_request": 1.0}) == pytest.approx(1000)
    assert process_rate({**VALUES, "images_per_request": 64.0}) == pytest.approx(VALUES["process_images_of_64"])


def test_gpu_is_limited_by_its_own_rate_or_by_its_process() -> None:
    assert gpus(VALUES, 1000, "low") == pytest.approx(2)
    assert gpus(VALUES, 1000, "high") == pytest.approx(1000 / (0.5 * 4 / 1.3e-3))


def test_gpu_costs_less_than_the_cores_of_a_higher_rate() -> None:
    rate = break_even(VALUES)
    assert cores(VALUES, rate, "default") * VALUES["price_core"] == pytest.approx(VALUES["price_gpu"])


def test_bytes_of_an_image_contain_its_share_of_the_head() -> None:
    assert bytes_of_image(VALUES, with_previews=False) == 700
    assert bytes_of_image(VALUES, with_previews=True) == 100 + 1000 + 7000


def test_tables_have_the_numbers_of_the_arithmetic() -> None:
    assert cores(VALUES, 1000, "default") == 200
    tables = tables_of(INPUTS)
    machines, shared = tables["Machines"].splitlines(), tables["Shared parts"].splitlines()
    assert machines[2:] == [
        "| requests/s | 2.5 | 250 | 25,000 |",
        "| cores for `default`, 100 steps | 2 | 200 | 20,000 |",
        # 200 cores cost $7.2 an hour, in which they generate 3.6 million images.
        "| cost of a million images, $ | 2 | 2 | 2 |",
        "| cores for `fast`, 4 steps | 1 | 10 | 1,000 |",
        "| cost of a million images with `fast`, $ | 1 | 0.1 | 0.1 |",
        "| H100s for `default`, an estimate | 1 | 1 to 2 | 65 to 200 |",
        "| cost of a million images on H100s, $ | 100 | 1 to 2 | 0.65 to 2 |",
        "| egress of a million images as PNG, $ | 0.07 | 0.07 | 0.07 |",
        "| egress of a million images as streams with previews, $ | 0.81 | 0.81 | 0.81 |",
    ]
    assert shared[2:] == [
        "| Ray's Python proxy | process | 1,000 images/s | 1 | 1 | 100 |",
        "| process that answers for a GPU | process | 3,100 images/s | 1 | 1 | 33 |",
        "| HAProxy | core | 40,000 images/s | 1 | 1 | 3 |",
        "| PostgreSQL, if all images are in batches | server | 20,000 images/s | 1 | 1 | 5 |",
        "| Prometheus, replicas with `default` | server | 10,000 images/s | 1 | 1 | 10 |",
        "| Redis, rate limits | server | 200,000 images/s | 1 | 1 | 1 |",
        "| network, streams with previews | 10 Gbit/s | 150,000 images/s | 1 | 1 | 1 |",
        "| network, PNG | 10 Gbit/s | 1,800,000 images/s | 1 | 1 | 1 |",
    ]


def test_scaling_prints_the_tables_and_a_file_can_replace_a_measured_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "docs/results", results)
    own = json.loads((results / "scaling.json").read_text())
    own["images_per_core_fast"] = {"name": "`fast`", "value": 100, "unit": "", "kind": "measured", "source": "here"}
    (results / "scaling.json").write_text(json.dumps(own))
    bench.main(["scaling", str(results)])
    printed = capsys.readouterr().out
    assert "| cores for `fast`, 4 steps | 1 | 15 | 1,400 |" in printed
    assert all(table in printed for table in tables_of(inputs_in(results)).values())
