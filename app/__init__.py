"""The service: an HTTP API and an engine that runs denoising steps. `app` imports `model`, never the reverse."""

from importlib.metadata import version

VERSION = version("unfog")
