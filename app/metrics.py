"""Declares all Prometheus metrics of the service, and the standard process_* metrics."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.errors import UnfogError

disable_created_metrics()  # The _created series double the number of series and are not used.

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1)
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
REJECTIONS = {  # error code -> value of the label `reason`
    "overloaded": "overloaded",
    "rate_limited": "rate_limited",
    "draining": "draining",
    "deadline_exceeded": "deadline",
}


class Metrics:
    """One set of metrics with its own registry, so that several applications in one process stay separate."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # adds process_*: memory, CPU time, open files
        self.requests = self._counter("requests", "HTTP requests completed, by route and status code.", "route", "code")
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "Seconds from the start of a request to the end of its response.",
            SECONDS,
            "route",
        )
        self.requests_in_progress = self._gauge("requests_in_progress", "HTTP requests in progress.")
        self.images = self._counter(
            "images", "Images generated, by digit and by the name of the class.", "digit", "label"
        )
        self.queue_depth = self._gauge("queue_depth_images", "Images in the queue, before their first step.")
        self.queue_capacity = self._gauge("queue_capacity_images", "Maximum number of images in the queue.")
        self.running_images = self._gauge("running_images", "Images between their first and last step.")
        self.queue_wait = self._one_thread_histogram(
            "queue_wait_seconds", "Seconds from the admission of an image to its first step.", SECONDS
        )
        self.admission_wait = self._one_thread_histogram(
            "admission_wait_steps", "Steps run between the admission of an image and its first step.", STEPS
        )
        self.rejected = self._counter("rejected", "Requests rejected or timed out, by reason.", "reason")
        self.cancelled = self._counter(
            "cancelled", "Images cancelled before their last step, by stage: waiting or running.", "stage"
        )
        self.denoise_steps = self._counter("denoise_steps", "Denoising steps run. One step covers all rows of a batch.")
        self.step_duration = self._one_thread_histogram(
            "denoise_step_duration_seconds", "Seconds per denoising step.", STEP_SECONDS
        )
        self.network = self._counter(
            "network_seconds", "Seconds spent in network calls; on a GPU, the time to enqueue them."
        )
        self.batch_rows = self._one_thread_histogram(
            "batch_rows", "Batch size of a denoising step, in rows (images).", POWERS_OF_TWO
        )
        self.batch_lines = self._counter("batch_lines", "Lines of batches answered, by result.", "result")
        self.unfinished_batches = self._gauge("unfinished_batches", "Batches that have not ended.")
        self.encode_duration = self._one_thread_histogram(
            "encode_duration_seconds", "Seconds to encode the images of a response, or one event of a stream.", SECONDS
        )
        self.model_info = self._gauge(
            "model_info", "A served model. The value is always 1.", "name", "sha256", "device", "dtype", "version"
        )
        self.ready = self._gauge("ready", "1 if new requests are accepted, otherwise 0.")
        self.alive = self._gauge("alive", "1 if the engine works, 0 if it has failed or is stuck.")
        for reason in REJECTIONS.values():
            self.rejected.labels(reason)
        for stage in ("waiting", "running"):
            self.cancelled.labels(stage)

    def count_rejection(self, error: UnfogError) -> None:
        """Increments unfog_rejected_total for the errors in REJECTIONS, and does nothing for other errors."""
        if error.code in REJECTIONS:
            self.rejected.labels(REJECTIONS[error.code]).inc()

    def watch_device_memory(self, read: Callable[[], float]) -> None:
        """Adds the gauge of GPU memory. `read` returns bytes."""
        self._gauge("device_memory_bytes", "GPU memory reserved by the service.").set_function(read)

    def watch_dropped_log_lines(self, read: Callable[[], float]) -> None:
        """Adds the counter of dropped log lines. `read` returns their number since the process started."""
        self.registry.register(_DroppedLogLines(read))

    def render(self) -> bytes:
        """Returns all metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="unfog", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="unfog", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="unfog", registry=self.registry, buckets=buckets)

    def _one_thread_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> "OneThreadHistogram":
        histogram = OneThreadHistogram(f"unfog_{name}", text, buckets)
        self.registry.register(histogram)
        return histogram


class OneThreadHistogram(Collector):
    """A histogram that only one thread writes to: the engine thread or the thread of the event loop.

    `observe` takes a tenth of the time that prometheus_client's Histogram takes, which locks each bucket.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text, self._buckets = name, text, buckets
        self._counts = [0] * (len(buckets) + 1)  # the values up to each bound, and those above all bounds
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` equal values."""
        self._counts[bisect_left(self._buckets, value)] += count
        self._sum += count * value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yields the metric family with the cumulative counts."""
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        counts = accumulate(list(self._counts))
        yield HistogramMetricFamily(self._name, self._text, list(zip(bounds, counts, strict=True)), self._sum)


class _DroppedLogLines(Collector):
    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "unfog_log_lines_dropped",
            "Log lines dropped because stderr was not read fast enough.",
            value=self._read(),
        )
