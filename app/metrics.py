"""Declares all metrics of the service, and the standard metrics of a process."""

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from app.errors import UnfogError

disable_created_metrics()  # a second series for each counter would tell nothing that scrapes do not

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1)
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
REJECTIONS = {  # by an error's code
    "overloaded": "overloaded",
    "rate_limited": "rate_limited",
    "draining": "draining",
    "deadline_exceeded": "deadline",
}


class Metrics:
    """One set of metrics with its own registry, so that two applications in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_*: memory, processor time, open files
        self.requests = self._counter("requests", "HTTP requests answered.", "route", "code")
        self.request_duration = self._histogram("request_duration_seconds", "Time of a request.", SECONDS, "route")
        self.requests_in_progress = self._gauge("requests_in_progress", "HTTP requests being answered.")
        self.images = self._counter("images", "Images finished.", "digit")
        self.queue_depth = self._gauge("queue_depth_images", "Images that wait for their first step.")
        self.queue_capacity = self._gauge("queue_capacity_images", "Images that may wait.")
        self.running_images = self._gauge("running_images", "Images between their first step and their last.")
        self.queue_wait = self._histogram("queue_wait_seconds", "An image's wait for its first step.", SECONDS)
        self.admission_wait = self._histogram(
            "admission_wait_steps", "Steps that ran between an image's admission and its first step.", STEPS
        )
        self.rejected = self._counter("rejected", "Requests refused or timed out.", "reason")
        self.cancelled = self._counter("cancelled", "Images given up before they were done.", "stage")
        self.denoise_steps = self._counter("denoise_steps", "Reverse steps run, each for a batch of rows.")
        self.step_duration = self._histogram("denoise_step_duration_seconds", "Time of a reverse step.", STEP_SECONDS)
        self.network = self._counter("network_seconds", "Time within the networks' calls; on a GPU, to enqueue them.")
        self.batch_rows = self._histogram("batch_rows", "Images in a reverse step.", POWERS_OF_TWO)
        self.encode_duration = self._histogram(
            "encode_duration_seconds", "Time to encode a response's images, or one event of a stream.", SECONDS
        )
        self.model_info = self._gauge(
            "model_info", "The model that is served.", "name", "sha256", "device", "dtype", "version"
        )
        self.ready = self._gauge("ready", "1 while new work is taken.")
        self.alive = self._gauge("alive", "0 where the engine has failed or is stuck.")
        for reason in REJECTIONS.values():
            self.rejected.labels(reason)
        for stage in ("waiting", "running"):
            self.cancelled.labels(stage)

    def count_rejection(self, error: UnfogError) -> None:
        """Counts errors that reject or abandon work. Other errors count only as requests with their status."""
        if error.code in REJECTIONS:
            self.rejected.labels(REJECTIONS[error.code]).inc()

    def watch_device_memory(self, read: Callable[[], float]) -> None:
        """Adds the gauge of the memory that the service holds on a GPU. `read` returns bytes."""
        self._gauge("device_memory_bytes", "Memory that the service holds on its device.").set_function(read)

    def watch_dropped_log_lines(self, read: Callable[[], float]) -> None:
        """Adds the counter of dropped log lines. The log belongs to the process and starts before the application."""
        self.registry.register(_DroppedLogLines(read))

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="unfog", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="unfog", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="unfog", registry=self.registry, buckets=buckets)


class _DroppedLogLines(Collector):
    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yields the counter."""
        yield CounterMetricFamily(
            "unfog_log_lines_dropped",
            "Log lines dropped because the reader of stderr did not take them.",
            value=self._read(),
        )
