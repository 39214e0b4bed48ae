"""Writes a page of tables from the JSON results of one machine.

The plots of the page docs/benchmarks/xeon.md are in the folder docs/benchmarks/xeon. Each has the name of its JSON
file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.files import write_atomically
from scripts.benchmark.host import COLUMNS as HOST_COLUMNS
from scripts.benchmark.host import host_table
from scripts.benchmark.profile import profile_table
from scripts.benchmark.report import COLUMNS, Table, table_of, without_empty
from scripts.benchmark.training import TRAINING_COLUMNS, training_table
from scripts.benchmark.versions import BASE, NEW, versions_table
from scripts.benchmark.versions import COLUMNS as VERSION_COLUMNS
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

MACHINE = ("processor", "cores", "features", "gpu", "torch", "threads")  # fields that all files of a page share
CELLS = (
    "Cells show the median over the repeats and their range in parentheses. With 12 or more repeats, the quartiles "
    "replace the range. `-` means that there is no figure. The columns are:"
)
EXPLANATIONS = {  # column of a table -> explanation
    "service": "The measured server. `unfog` is this service with its default settings. `unfog, N rows` has "
    "`UNFOG_MAX_BATCH=N`. docs/benchmarks.md describes the others.",
    "load": "The clients and their requests. `16 x 1 image` means 16 clients that request one image at a time. Each "
    "client sends its next request when the previous one is answered. `50% of capacity` means requests for one image "
    "at random times (Poisson), at 50% of the throughput with 64 clients. `the slower service` is the slower one of "
    "unfog and LitServe. Guidance is off unless the name says `guided`. `another process on one core` computes all the "
    "time. `a flood of GET /livez` is a client that sends as many of these requests as possible. If a load has two "
    "kinds of requests, the kind follows after a colon, and the latencies are of this kind.",
    "images/s": "Throughput of all requests of the load, in images per second. A request of a client "
    "counts with the fraction of its time that is in the measurement. A request at a random time counts if it "
    "completes in the measurement.",
    "images/s, ratio to the first": "Throughput divided by that of the first service with this load, in the same "
    "repeat. The median of these ratios can differ from the ratio of the medians.",
    "in time, images/s": "Throughput of the requests that were answered within the latency limit.",
    "p50, s": "Median latency in seconds. The latency of a request at a random time counts from its planned time.",
    "p95, s": "95th percentile of the latency in seconds.",
    "p95, ratio to the first": "95th percentile divided by that of the first service with this load, in the same "
    "repeat.",
    "simulated p95, s": "95th percentile of a simulation with the same arrivals. Its step times were measured before "
    "and after the load, without a running service.",
    "replayed p95, s": "95th percentile of the simulation with the step times of the service under this load.",
    "replayed p95 with request batching, s": "95th percentile of the simulation with the same step times, if whole "
    "requests are batched: a batch starts when the previous batch has ended.",
    "p99, s": "99th percentile of the latency in seconds.",
    "wait for the first step, s": "Median time from a request to its first step.",
    "rows per step": "Mean number of images in a step. If there are two numbers, they are of base and new.",
    "step time p95, s": "95th percentile of the time of a step.",
    "time outside the network": "Share of the time in which no network call runs. An idle service has a high share.",
    "share of the matrix rate": "Arithmetic of the images per second, divided by the matrix rate. The matrix rate is "
    "the highest rate of a large matrix product in the run.",
    "share of the adjacent matrix rate": "The same, divided by the matrix rate just before and after the load. It is "
    "above 100% if the machine was faster during the load.",
    "memory, MiB": "Memory of all processes of the service. Shared memory counts once.",
    "not compiled": "Time in the step as PyTorch runs it without compilation.",
    "compiled": "Time in the compiled step. A fused kernel counts as one kind.",
    "training loop": "The measured training loop. `scripts.train` is the one of this project. `a plain loop` uses a "
    "DataLoader and Adam in float32, without compilation.",
    "training images/s": "Images per second, including the backward pass and the optimizer.",
    "share of the limit": "Images per second divided by the limit that the matrix rate sets.",
    "figure": "The measured figure. Figures of the engine thread are CPU times of a step. Those of admission are CPU "
    "times for one image.",
    "unit": "Unit of the figures.",
    BASE: "Median of the older version.",
    NEW: "Median of the newer version.",
    "ratio": "Figure of new divided by figure of base: median and range over the pairs of measurements.",
}


def write_page(folder: Path, out: Path, reporter: Reporter) -> None:
    """Writes the page of the JSON results in a folder. Raises ScriptError like `page_of`."""
    write_atomically(out, page_of(folder, out).encode())
    reporter.line(f"Wrote {out}")


def page_of(folder: Path, page: Path) -> str:
    """Returns the text of the page: the machine, the columns, and the table and plot of each file.

    `page` is the path of the page, which links to its plots. Raises ScriptError if the folder does not have results of
    exactly one machine.
    """
    contents = {file.stem: _read(file) for file in sorted(folder.glob("*.json")) if ".answers" not in file.name}
    machines = [{name: content["machine"].get(name) for name in MACHINE} for content in contents.values()]
    if not machines:
        raise ScriptError(f"{folder} has no JSON files. Name a folder with results of scripts.bench")
    for name, machine in zip(contents, machines, strict=True):
        if machine != machines[0]:
            raise ScriptError(f"{folder}: {next(iter(contents))}.json and {name}.json are from different machines")
    tables = [table_in(content) for content in contents.values()]
    used = {column for columns, _ in tables for column in columns}
    explained = [f"- {column}: {text}" for column, text in EXPLANATIONS.items() if column in used]
    sections = [f"# Measured on {page.stem}", _machine_line(machines[0]), CELLS, "\n".join(explained)]
    for name, content in contents.items():
        sections += [f"## {name}", *_how(content), as_table(*table_in(content)).rstrip()]
        if (page.with_suffix("") / f"{name}.png").exists():
            sections.append(f"![{name}]({page.stem}/{name}.png)")
    return "\n\n".join(sections) + "\n"


def table_in(content: Mapping[str, Any]) -> Table:
    """Returns the table of a JSON result, as it was printed after the measurement."""
    if "milliseconds" in content:
        return profile_table(content)
    if "host" in content:
        return without_empty(HOST_COLUMNS, host_table(content["host"]))
    if "limit" in content:
        return TRAINING_COLUMNS, training_table(content["images_a_second"], content["limit"])
    if "seconds_in_a_pair" in content:
        return VERSION_COLUMNS, versions_table(content["rows"])
    return without_empty(COLUMNS, table_of(content["rows"]))


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        table_in(content)
        _machine_line(content["machine"])
        _how(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ScriptError(f"{file} is not a complete result of scripts.bench. Remove it, or measure again") from error
    return content


def _machine_line(machine: Mapping[str, Any]) -> str:
    gpu = machine["gpu"] or "no GPU"
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])}), {gpu}, "
        f"torch {machine['torch']}, {machine['threads']} compute threads."
    )


def _how(content: Mapping[str, Any]) -> list[str]:
    """Returns a paragraph with the durations of a measurement and the matrix rate, if the result has loads."""
    if "seconds" not in content:
        return []
    seconds, rate = content["seconds"], content["machine"]["matrix_rate"]
    return [
        f"Each measurement took {seconds['window']} s, after {seconds['settle']} s of load. Latency limit: "
        f"{seconds['objective']:g} s. Matrix rate: {rate / 1e9:.0f} GFLOP/s."
    ]
