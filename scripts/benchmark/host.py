"""Measures the host cost of the service: its work on the processor while the device computes.

The parts of host_check.py make the measurements. The steps of its service only sleep as long as a step on a GPU would
take. With `base`, the version in another folder is measured too. The versions are measured in turn, so that changes of
the machine's speed affect both of them.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.files import write_json
from scripts.benchmark.clients import check_answers, closed_loop, connected
from scripts.benchmark.loads import LARGEST_REQUEST, Load, clients_of_one, many
from scripts.benchmark.machine import this_machine
from scripts.benchmark.report import with_spread
from scripts.benchmark.services import Contestant, started
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

MODULES = ("scripts.benchmark.host_check", "app.host_check")  # the second one in earlier versions
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # one thread of PyTorch; with a GPU, the host computes no large tensors
ONE, LARGE = "one-image requests per second, 64 clients", "images per second in requests of 64, 16 clients"
CLIENTS, LARGE_CLIENTS = 64, 16
SETTLE_SECONDS = 2.0
BASE, NEW = "base", "new"
COLUMNS = ("figure", "unit", BASE, NEW, "ratio")
UNITS = {"engine": "ms", "admission": "µs", "operations": "", "requests": "1/s"}
FACTORS = {"engine": 1e3, "admission": 1e6, "operations": 1, "requests": 1}

Figures = dict[str, dict[str, float]]  # part -> name of the figure -> value in SI units


def measure_host(base: Path | None, repeats: int, seconds: float, out: Path, reporter: Reporter) -> None:
    """Measures each figure `repeats` times, writes the results and prints the table of medians.

    Each load over HTTP runs for `seconds`. Raises ScriptError if a version has none of MODULES, or fails.
    """
    folders = {NEW: Path.cwd()} if base is None else {BASE: base, NEW: Path.cwd()}
    for folder in folders.values():
        _module_in(folder)
    found: dict[str, list[Figures]] = defaultdict(list)
    for repeat in range(repeats):
        for name, folder in folders.items():
            found[name].append(_figures(folder, seconds))
            reporter.line(f"{name}, repeat {repeat + 1} of {repeats}")
            write_json(out, {"machine": this_machine().as_json(), "http_seconds": seconds, "host": dict(found)})
    reporter.line(as_table(COLUMNS, host_table(found)))


def host_table(found: Mapping[str, Sequence[Figures]]) -> list[list[str]]:
    """Returns a line for each figure: medians and ranges of both versions, and of the ratios of each repeat."""
    lines = []
    for part, figures in found[NEW][0].items():
        for figure in figures:
            values = {name: [FACTORS[part] * each[part][figure] for each in runs] for name, runs in found.items()}
            new, base = values[NEW], values.get(BASE, [])
            ratios = [a / b for a, b in zip(new, base, strict=False)]
            lines.append([figure, UNITS[part], *(with_spread(each) for each in (base, new, ratios))])
    return lines


def _figures(folder: Path, seconds: float) -> Figures:
    """Returns one measurement of every figure of the version in a folder."""
    engine, admission, operations = (_run(part, folder) for part in ("engine", "admission", "operations"))
    return {
        "engine": {f"engine thread, a step of 512 rows, {load}": value for load, value in engine.items()},
        "admission": {f"admission, backlog of {size} images": value for size, value in admission.items()},
        "operations": {
            f"operations outside of the network, {kind} step": counts["other"] for kind, counts in operations.items()
        },
        "requests": _requests(folder, seconds),
    }


def _module_in(folder: Path) -> str:
    """Returns the one of MODULES that the version in a folder has. Raises ScriptError if it has none."""
    for module in MODULES:
        if (folder / module.replace(".", "/")).with_suffix(".py").is_file():
            return module
    raise ScriptError(f"{folder} has no module {MODULES[0]}. Name another folder with --base")


def _run(part: str, folder: Path) -> dict[str, Any]:
    module = _module_in(folder)
    command = [sys.executable, "-m", module, part]
    done = subprocess.run(command, cwd=folder, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ScriptError(f"{module} {part} in {folder} failed: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _requests(folder: Path, seconds: float) -> dict[str, float]:
    """Returns the rates of both loads over HTTP."""
    arguments = ("-m", _module_in(folder), "serve", "{port}")
    with started(Contestant("host_check", arguments, ONE_THREAD, folder=folder)) as running:
        large = Load(f"{LARGE_CLIENTS} x {LARGEST_REQUEST} images", (many,) * LARGE_CLIENTS)
        one, of_many = (_rate(running.url, load, seconds) for load in (clients_of_one(CLIENTS), large))
    return {ONE: one, LARGE: of_many}


def _rate(url: str, load: Load, seconds: float) -> float:
    """Returns the images per second of a load. Raises ScriptError if a request fails."""

    async def run() -> float:
        async with connected(url, "application/json") as send:
            window = await closed_loop(send, load.clients, SETTLE_SECONDS, seconds)
        check_answers(window.answers, load.name)
        return window.images_a_second

    return asyncio.run(run())
