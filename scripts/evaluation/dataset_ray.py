"""Generates the images of a data set on the hosts of a Ray cluster, with Ray Data.

A worker is a process of the cluster that loads the checkpoint once. It generates blocks: the batches that the local
engine generates, with the same rows in the same order. The bytes are therefore those of the local engine, also where
the size of a batch changes the last bits. Ray starts a worker again if it dies, and repeats its blocks.

The driver, which is the process that the user has started, sends the checkpoint to the workers and writes all files.
The other hosts need only the installation.
"""

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.exceptions import RayError
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.pixels import to_pixels
from model.png import SOFTWARE
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, load_clip
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.dataset import Engine, Part

CONNECT_SECONDS = 10
NO_LIMIT = -1  # seconds without progress: workers can wait for other jobs on the cluster


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every worker needs to generate its blocks."""

    checkpoint: Checkpoint
    options: DrawingOptions
    seed: int
    compile: str  # auto, on or off
    num_threads: int


class ImageWorker:
    """Generates blocks of images in a process of the cluster."""

    def __init__(self, assignment: Assignment) -> None:
        torch.set_num_threads(assignment.num_threads)
        self._assignment, self._drawer = assignment, Drawer(assignment.checkpoint)
        self._drawer.compile(assignment.compile, Reporter())
        self.facts = {**self._drawer.facts, **_host_facts(self._drawer, assignment.options)}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the pixels of a block, and the facts that determine them."""
        y, index = (torch.as_tensor(np.array(row[name])) for name in ("y", "index"))  # int64 (B,) each
        options, seed = self._assignment.options, self._assignment.seed
        x_0 = self._drawer.draw(y, index, options, Reporter(), seed=seed, batch_size=len(y))
        pixels, host = to_pixels(x_0).numpy().tobytes(), ray.util.get_node_ip_address()
        return {"pixels": pixels, "facts": json.dumps(self.facts), "host": host, "process": os.getpid()}


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of a run: their number, and the resources that each of them reserves on its host."""

    number: int
    resources: dict[str, Any]  # num_cpus or num_gpus

    @property
    def needs(self) -> str:
        return ", ".join(f"{name}={amount}" for name, amount in self.resources.items())

    def facts(self, assignment: Assignment) -> dict[str, Any]:
        """Returns the facts of a worker that starts now and ends at once."""
        found: dict[str, Any] = ray.get(ray.remote(**self.resources)(_facts_of_worker).remote(assignment))
        return found

    def rows(self, batches: list[Part], assignment: Assignment) -> Iterator[dict[str, Any]]:
        """Yields what the workers return for these batches, in the same order."""
        items = [{"y": y.numpy(), "index": index.numpy()} for y, index in batches]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            ImageWorker,  # type: ignore[arg-type] # the hints of `map` have no classes
            fn_constructor_kwargs={"assignment": assignment},
            compute=ray.data.ActorPoolStrategy(size=min(self.number, len(items))),
            **self.resources,
        )
        yield from dataset.iter_rows()


@contextmanager
def ray_engine(
    request: DrawingRequest,
    drawer: Drawer,
    options: DrawingOptions,
    reporter: Reporter,
    *,
    address: str | None,
    num_workers: int | None,
) -> Iterator[Engine]:
    """Generates the images on the Ray cluster with this address. None means the cluster that `ray.init` chooses.

    Each worker has a GPU, or `request.num_threads` CPUs if the cluster has no GPUs. By default, there are as many
    workers as the cluster has these resources. Raises ScriptError if it has none, or if a worker fails.
    """
    num_threads = request.num_threads or 1
    with _connected(address), _worker_errors():
        workers = _workers(num_workers, num_threads)
        reporter.line(f"Waiting for the first of {workers.number} Ray workers with {workers.needs}")
        # The network of drawer.checkpoint may already be on a GPU of this host, or have another precision.
        loaded = checkpoint.load(request.checkpoint)
        assignment = Assignment(loaded, options, request.seed, request.compile, num_threads)
        facts = workers.facts(assignment)
        reporter.line(f"{facts['device']}, {facts['dtype']}, {'' if facts['compiled'] else 'not '}compiled")
        # All workers use the compile mode that the first one has found to be possible.
        assignment = replace(assignment, compile="on" if facts["compiled"] else "off")

        def draw(parts: Sequence[Part]) -> Iterator[Tensor]:
            batches = [[*zip(*(each.split(request.batch_size) for each in part), strict=True)] for part in parts]
            if not batches:
                return
            num_images = sum(len(y) for y, _ in parts)
            with reporter.task(f"generating {num_images} images", num_images, "images") as task:
                rows = workers.rows([*chain.from_iterable(batches)], assignment)
                for of_part in batches:
                    images = []
                    for row in islice(rows, len(of_part)):
                        images.append(images_of(row, facts))
                        task.advance(len(images[-1]))
                    yield torch.cat(images)

        yield Engine({name: facts[name] for name in drawer.facts}, draw)


def images_of(row: dict[str, Any], facts: dict[str, Any]) -> Tensor:
    """Returns the images of a block, uint8 (B, 1, 28, 28).

    Raises ScriptError if the worker has other facts than the first one, because its images could have other bytes.
    """
    found = json.loads(row["facts"])
    if differing := sorted(name for name in {*facts, *found} if found.get(name) != facts.get(name)):
        raise ScriptError(
            f"The Ray worker {row['process']} on {row['host']} can give other bytes than the first one, because it "
            f"differs in {', '.join(differing)}. Use hosts with the same processors, GPUs and installation"
        )
    return torch.from_numpy(np.frombuffer(row["pixels"], np.uint8).copy()).reshape(-1, 1, 28, 28)


def _facts_of_worker(assignment: Assignment) -> dict[str, Any]:
    return ImageWorker(assignment).facts


def _host_facts(drawer: Drawer, options: DrawingOptions) -> dict[str, Any]:
    """Returns what must be the same on all hosts besides `Drawer.facts`, so that they give the same bytes."""
    has = torch.cpu.get_capabilities()
    features = sorted(name for name, value in has.items() if value is True)
    facts = {
        "release": SOFTWARE,
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if drawer.device.type == "cuda" else " ".join(features),
    }
    return facts | ({"clip": load_clip(options.clip.model).sha256} if options.clip else {})


def _workers(number: int | None, num_threads: int) -> Workers:
    """Returns `number` workers, or as many as the cluster has resources for."""
    hosts = [host["Resources"] for host in ray.nodes() if host["Alive"]]
    name, amount = ("GPU", 1) if any(host.get("GPU") for host in hosts) else ("CPU", num_threads)
    number = number or int(sum(host.get(name, 0) // amount for host in hosts))
    if not number:
        raise ScriptError(
            f"No host of the Ray cluster has {amount} {name}s. Use a lower --num-threads, or give --workers if the "
            "cluster adds hosts"
        )
    return Workers(number, {f"num_{name.lower()}s": amount})


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connects to the cluster, or starts one, and disconnects at the end."""
    _check_address(address)
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # ray.init has no common type, and raises Exception if its processes start too slowly
        raise ScriptError(f"Cannot use Ray: {error}") from error
    signal.signal(signal.SIGTERM, at_sigterm)  # ray.init replaces the handler of the Reporter
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that it shows no bars
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # the driver gets the blocks in order, so it can write a part
        context.execution_no_progress_timeout_s = NO_LIMIT
        yield
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raises ScriptError if nothing listens at the address. `ray.init` would try to connect for many minutes."""
    host_and_port = re.fullmatch(r"([^:/]+):(\d{1,5})", address or os.environ.get("RAY_ADDRESS", ""))
    if host_and_port:
        try:
            socket.create_connection((host_and_port[1], int(host_and_port[2])), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ScriptError(
                f"No Ray cluster can be reached at {host_and_port[0]}: {error}. Check the address"
            ) from error
    elif address:
        raise ScriptError(f"--ray-address {address} must be HOST:PORT of the head of the cluster, like 10.0.0.1:6379")


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Raises ScriptError for the error of a worker. The last line of its traceback is the reason."""
    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ScriptError(f"A Ray worker has failed: {reason}. Its log is in /tmp/ray of its host") from error
