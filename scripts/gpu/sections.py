"""The sections, in the order in which they run. Each runs in its own process."""

from dataclasses import dataclass

_MEASUREMENTS = "scripts.gpu.measurements"
HTTP_PACKAGES = ("fastapi", "uvicorn", "pydantic_settings", "prometheus_client", "limits", "structlog", "PIL")


@dataclass(frozen=True, slots=True)
class Section:
    """A section. `function` is a function of `module`. It takes Options and yields Figures."""

    name: str
    text: str  # what the section measures
    module: str
    seconds: float  # time limit
    function: str = "measure"
    needs_gpu: bool = False
    packages: tuple[str, ...] = ()  # packages that it needs in addition to those of the engine


SECTIONS = (
    Section("facts", "the machine, its memory bandwidth, its matrix rate", f"{_MEASUREMENTS}.facts", 45),
    Section("correctness", "probe images, noise, tests for a GPU", f"{_MEASUREMENTS}.correctness", 120),
    Section("no_gpu", "the behaviour if no GPU is visible", f"{_MEASUREMENTS}.failures", 60, "measure_no_gpu"),
    Section(
        "synchronisations",
        "how often the host waits for the GPU in a step",
        f"{_MEASUREMENTS}.synchronisations",
        45,
        needs_gpu=True,
    ),
    Section("invariance", "equal bytes of an image in every batch", f"{_MEASUREMENTS}.invariance", 90),
    Section("steps", "the duration and the kernels of a step", f"{_MEASUREMENTS}.steps", 120),
    Section("engine", "one image and loads, without HTTP", f"{_MEASUREMENTS}.loads", 140),
    Section("http", "the start, one image and loads over HTTP", "scripts.gpu.service", 140, packages=HTTP_PACKAGES),
    Section("start", "the captured graphs and their memory", f"{_MEASUREMENTS}.start", 75, needs_gpu=True),
    Section(
        "memory",
        "a shortage of GPU memory, and the recovery",
        f"{_MEASUREMENTS}.failures",
        90,
        "measure_memory",
        needs_gpu=True,
    ),
    Section(
        "assert_graph",
        "an error in a kernel, with graphs",
        f"{_MEASUREMENTS}.failures",
        45,
        "measure_graph_assert",
        needs_gpu=True,
    ),
    Section(
        "assert_eager",
        "an error in a kernel, without graphs",
        f"{_MEASUREMENTS}.failures",
        45,
        "measure_eager_assert",
        needs_gpu=True,
    ),
    Section(
        "compiled",
        "the duration of compiled steps",
        f"{_MEASUREMENTS}.steps",
        240,
        "measure_compiled",
        needs_gpu=True,
    ),
)
