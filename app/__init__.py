"""The service: an HTTP API, and an engine that runs denoising steps. `app` may import `model`, but not the reverse."""

from importlib.metadata import version

VERSION = version("unfog")
