"""Measures the highest resident memory of each process of the service under load, without and with CLIP.

Two clients send the largest requests at the same time. With CLIP, the requests have CLIP guidance, and all images are
scored. The sum of both processes is an upper bound, because they share the code of their libraries. The proportional
set size would not count it twice, but it is lower on a machine where other processes use the same libraries.
"""

import json
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from model.files import write_json
from scripts.benchmark import loads
from scripts.benchmark.http_client import fetch
from scripts.benchmark.machine import this_machine
from scripts.benchmark.services import Running, started, this_service
from scripts.common.progress import Reporter, require

SETTINGS = {"without CLIP": "off", "with CLIP": "auto"}  # name of the result -> UNFOG_CLIP
CLIENTS, ROUNDS = 2, 1
NUM_STEPS = 10
SAMPLE_SECONDS = 0.5  # time between two readings of the memory
TIMEOUT = 1800  # seconds for a request; scores are slow while other processes use the processor


def measure_memory(out: Path, reporter: Reporter) -> None:
    """Starts the service with each of SETTINGS, loads it, writes the results and prints them."""
    results = {}
    for name, clip in SETTINGS.items():
        with started(this_service(clip=clip, request_timeout=str(TIMEOUT))) as running:
            service, child = most_memory(running, has_clip=clip != "off")
        results[name] = {"service": service, "child": child, "sum": service + child}
        reporter.line(f"{name}: service {service} MiB, child process {child} MiB")
    write_json(out, {"machine": this_machine().as_json(), "mebibytes": results})


def most_memory(running: Running, *, has_clip: bool) -> tuple[int, int]:
    """Loads a service. Returns the highest resident memory of its process and of its child processes, in MiB."""
    psutil = require("psutil", extra="bench")
    service, of_service, of_children = psutil.Process(running.pid), 0, 0
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(_load, running, number, has_clip=has_clip) for number in range(CLIENTS)]
        while wait(clients, SAMPLE_SECONDS).not_done:
            of_service = max(of_service, service.memory_info().rss)
            of_children = max(of_children, sum(child.memory_info().rss for child in service.children()))
        for client in clients:
            client.result()
    return round(of_service / 2**20), round(of_children / 2**20)


def _load(running: Running, number: int, *, has_clip: bool) -> None:
    body: dict[str, Any] = {"digit": 7, "seed": number, "num_steps": NUM_STEPS, "count": loads.LARGEST_REQUEST}
    if has_clip:
        body |= {"clip_guidance_scale": 4, "clip_prompt": f"a thick seven, {number}"}
    for _ in range(ROUNDS):
        answer = json.loads(fetch(f"{running.url}/generate", body, timeout=TIMEOUT))
        if has_clip:
            images = [image["png"] for image in answer["images"]]
            prompts = ["a thick seven", "a thin seven"]
            fetch(f"{running.url}/score", {"images": images, "prompts": prompts}, timeout=TIMEOUT)
