"""Computes how many processors, GPUs and shared parts a rate of images needs, and what a million images cost.

Measured inputs come from the JSON files of the benchmarks. scaling.json has the estimates and assumptions: name ->
value, unit, kind and source. Replace them, above all the prices, with those of your machines. A value in this file also
replaces a measured one of the same name.

The time of a request in the process of a service is a + b * images. Two measured loads, with 1 and with 64 images in a
request, give a and b. The rate of a GPU is the smaller of its own rate and of the rate at which one process of the
service can answer requests.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.benchmark.host import LARGE, ONE
from scripts.benchmark.loads import LARGEST_REQUEST
from scripts.benchmark.routing import LOADS, MIX
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

RATES = (10, 1_000, 100_000)  # images per second
SECONDS_OF_HOUR, BITS, GIGA, MILLION = 3600, 8, 1e9, 1e6
LINK_BITS = 10e9  # bits per second
Inputs = Mapping[str, Mapping[str, Any]]  # name -> value, unit, kind and source
Values = Mapping[str, float]
Cell = Callable[[Values, float], str]  # from the values and a rate of images to a cell of a table
Need = Callable[[Values, float], float]  # from the values and a rate of images to a number of units


def print_scaling(results: Path, reporter: Reporter) -> None:
    """Prints the tables for the inputs in the folder of the results."""
    for title, table in tables_of(inputs_in(results)).items():
        reporter.line(f"{title}\n{table}")


def inputs_in(results: Path) -> Inputs:
    """Returns the measured inputs from the JSON files in docs/results, and those of scaling.json."""

    def read(name: str) -> Any:
        return json.loads((results / name).read_text())

    closed, models = (read(f"benchmarks/zen5/{name}.json") for name in ("closed", "models"))
    host, check = read("benchmarks/epyc/host.json")["host"]["new"], read("scaling-replicas.json")
    sizes = check["sizes"]

    def images_per_core(content: Any, load: str) -> float:
        rates = [row["images_a_second"] for row in content["rows"] if row["load"] == load]
        return statistics.median(rates) / content["machine"]["cores"]

    def measured(name: str, value: float, unit: str, source: str) -> dict[str, Any]:
        return {"name": name, "value": value, "unit": unit, "kind": "measured", "source": source}

    of_one, of_many = (statistics.median(each["requests"][figure] for each in host) for figure in (ONE, LARGE))
    haproxy = statistics.median(row["cores"]["HAProxy"] / row["rate"] for row in check["rows"])
    mean_images = sum(count * share for count, share in LOADS[MIX].items())
    default, fast = (f"{LARGEST_REQUEST} images, guided", f"fast, 2 x {LARGEST_REQUEST} images")
    page, replicas = "[Zen 5](benchmarks/zen5.md)", "`bench replicas`"
    return {
        "images_per_core_default": measured(
            "`default` on a core", images_per_core(closed, f"2 x {default}"), "images/s", f"{page}, two cores"
        ),
        "images_per_core_fast": measured(
            "`fast` on a core", images_per_core(models, fast), "images/s", f"{page}, two cores"
        ),
        "process_requests_of_1": measured(
            "requests of one image that a process can answer",
            of_one,
            "requests/s",
            "`bench host`, two cores of a Zen 4",
        ),
        "process_images_of_64": measured(
            "images that a process can answer in requests of 64", of_many, "images/s", "`bench host`, the same"
        ),
        "haproxy_seconds": measured(
            "processor time of HAProxy",
            haproxy,
            "s a request",
            f"{replicas}, with a short configuration that does not repeat requests, at 48 requests/s",
        ),
        "bytes_head": measured("head of an answer", sizes["head"], "bytes", replicas),
        "bytes_png": measured("a PNG", sizes["png"], "bytes", replicas),
        "bytes_events": measured("events of a stream without previews", sizes["events"], "bytes", replicas),
        "bytes_preview": measured("a preview", sizes["preview"], "bytes", replicas),
        "series_per_replica": measured("time series of a replica", sizes["series"], "", replicas),
        "images_per_request": {
            "name": "images of a request",
            "value": mean_images,
            "unit": "",
            "kind": "assumption",
            "source": "the mean of the [mix](#routing)",
        },
        **read("scaling.json"),
    }


def tables_of(inputs: Inputs) -> dict[str, str]:
    """Returns the tables by title."""
    values = {name: float(each["value"]) for name, each in inputs.items()}
    columns = tuple(f"{figure(rate)} images/s" for rate in RATES)
    machines = [[name, *(cell(values, rate) for rate in RATES)] for name, cell in MACHINES.items()]
    shared, largest = [], RATES[-1]
    for name, (unit, need) in SHARED.items():
        enough = f"{figure(largest / need(values, largest))} images/s"
        shared.append([name, unit, enough, *(_whole(need(values, rate)) for rate in RATES)])
    of_inputs = [
        [each["name"], f"{figure(each['value'])} {each['unit']}".strip(), each["kind"], each["source"]]
        for each in inputs.values()
    ]
    return {
        "Machines": as_table(("", *columns), machines),
        "Shared parts": as_table(("part", "unit", "one is enough up to", *columns), shared),
        "Inputs": as_table(("input", "value", "kind", "source"), of_inputs),
    }


def figure(value: float) -> str:
    """Returns a number with two significant digits."""
    digits = 1 - math.floor(math.log10(value)) if value else 0
    text = f"{round(value, digits):,.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def requests(values: Values, rate: float) -> float:
    """Returns the requests per second."""
    return rate / values["images_per_request"]


def cores(values: Values, rate: float, model: str) -> float:
    """Returns the number of cores of replicas without a GPU."""
    return rate / (values["load"] * values[f"images_per_core_{model}"])


def replicas(values: Values, rate: float, model: str) -> int:
    """Returns the number of replicas without a GPU."""
    return math.ceil(cores(values, rate, model) / values["cores_per_replica"])


def process_rate(values: Values) -> float:
    """Returns the images per second for which one process of the service can answer requests."""
    one, many = 1 / values["process_requests_of_1"], LARGEST_REQUEST / values["process_images_of_64"]
    per_image = (many - one) / (LARGEST_REQUEST - 1)
    images = values["images_per_request"]
    return images / (one + (images - 1) * per_image)


def gpus(values: Values, rate: float, bound: str) -> float:
    """Returns the number of GPUs with one process each. `bound` is `low` or `high`, the bound of the GPU's own rate."""
    return rate / (values["load"] * min(values[f"gpu_images_{bound}"], process_rate(values)))


def break_even(values: Values) -> float:
    """Returns the rate of `default` from which on one GPU costs less than the cores that it replaces."""
    return values["price_gpu"] / values["price_core"] * values["images_per_core_default"] * values["load"]


def cost_of_million(per_hour: float, rate: float) -> float:
    """Returns the cost of a million images."""
    return per_hour / (rate * SECONDS_OF_HOUR) * MILLION


def bytes_of_image(values: Values, *, with_previews: bool) -> float:
    """Returns the bytes that leave the service for each image, with the heads of the answers."""
    head = values["bytes_head"] / values["images_per_request"]
    if with_previews:
        return head + values["bytes_events"] + values["previews"] * values["bytes_preview"]
    return head + values["bytes_png"]


def _cores(model: str) -> Cell:
    return lambda values, rate: _whole(cores(values, rate, model))


def _cost_of_cores(model: str) -> Cell:
    def cell(values: Values, rate: float) -> str:
        per_hour = math.ceil(cores(values, rate, model)) * values["price_core"]
        return figure(cost_of_million(per_hour, rate))

    return cell


def _gpus(values: Values, rate: float) -> str:
    return _range(*(_whole(gpus(values, rate, bound)) for bound in ("high", "low")))


def _cost_of_gpus(values: Values, rate: float) -> str:
    per_hour = (math.ceil(gpus(values, rate, bound)) * values["price_gpu"] for bound in ("high", "low"))
    return _range(*(figure(cost_of_million(each, rate)) for each in per_hour))


def _cost_of_egress(*, with_previews: bool) -> Cell:
    def cell(values: Values, _: float) -> str:
        return figure(MILLION * bytes_of_image(values, with_previews=with_previews) / GIGA * values["price_gigabyte"])

    return cell


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _whole(count: float) -> str:
    """Returns a number of machines: rounded up, and with two significant digits."""
    return figure(math.ceil(count))


def _links(*, with_previews: bool) -> Need:
    """Returns how many links of LINK_BITS a rate needs."""
    return lambda values, rate: rate * bytes_of_image(values, with_previews=with_previews) * BITS / LINK_BITS


MACHINES: dict[str, Cell] = {
    "requests/s": lambda values, rate: figure(requests(values, rate)),
    "cores for `default`, 100 steps": _cores("default"),
    "cost of a million images, $": _cost_of_cores("default"),
    "cores for `fast`, 4 steps": _cores("fast"),
    "cost of a million images with `fast`, $": _cost_of_cores("fast"),
    "H100s for `default`, an estimate": _gpus,
    "cost of a million images on H100s, $": _cost_of_gpus,
    "egress of a million images as PNG, $": _cost_of_egress(with_previews=False),
    "egress of a million images as streams with previews, $": _cost_of_egress(with_previews=True),
}
# part -> what one unit of it is, and how many units a rate needs
SHARED: dict[str, tuple[str, Need]] = {
    "Ray's Python proxy": ("process", lambda values, rate: requests(values, rate) * values["ray_proxy_seconds"]),
    "process that answers for a GPU": ("process", lambda values, rate: rate / process_rate(values)),
    "HAProxy": ("core", lambda values, rate: requests(values, rate) * values["haproxy_seconds"]),
    "PostgreSQL, if all images are in batches": (
        "server",
        lambda values, rate: rate / values["images_per_line"] / values["postgres_lines"],
    ),
    "Prometheus, replicas with `default`": (
        "server",
        lambda values, rate: (
            replicas(values, rate, "default") * values["series_per_replica"] / values["prometheus_series"]
        ),
    ),
    "Redis, rate limits": ("server", lambda values, rate: requests(values, rate) / values["redis_requests"]),
    "network, streams with previews": ("10 Gbit/s", _links(with_previews=True)),
    "network, PNG": ("10 Gbit/s", _links(with_previews=False)),
}
