"""The service: an HTTP API, and an engine that runs denoising steps. `app` may import `model`, but not the reverse."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("unfog")
except PackageNotFoundError:  # The project is not installed.
    VERSION = "unknown"
