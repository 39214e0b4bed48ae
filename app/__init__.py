"""The service: HTTP in front of a step engine. Knows the model; the model does not know it."""

from importlib.metadata import version

VERSION = version("unfog")
