"""Serves, configured by UNFOG_* variables (README.md, Settings)."""

import argparse
import asyncio
import json
import logging
import os
import sys

from app.config import Settings, SettingsError, load_settings, unknown_variables
from app.device import RunnerError
from app.logs import configure_logging
from app.main import create_app
from app.runner import Runner
from app.server import GivenUpError, StartError, allow_connections, bind, serve
from app.traces import TracesError
from model.memory import keep_freed_memory

log = logging.getLogger(__name__)

LEAST_KEY = 16  # characters; fewer can be guessed


def main() -> None:
    """Serves; one sentence and status 2 where that is not possible."""
    arguments = _parser().parse_args()
    if arguments.openapi:
        print(json.dumps(create_app(Settings.model_construct()).openapi(), indent=2))
        return
    try:
        settings = load_settings()
        configure_logging(settings.log_format, settings.log_level)
        if short := [place for place, key in enumerate(settings.api_keys, 1) if len(key) < LEAST_KEY]:
            log.warning("UNFOG_API_KEYS: key %s can be guessed; take one of `openssl rand -hex 32`", short)
        for name in unknown_variables():
            log.warning("%s is no setting of this release, and changes nothing", name)
        if arguments.compile:
            Runner.load(settings.model_copy(update={"compile": "on"}))
            return
        if not keep_freed_memory():
            log.info("this C library keeps no memory for the next step: steps take a little longer")
        allow_connections()
        app = create_app(settings)
        listener = bind(settings.host, settings.port)
        asyncio.run(serve(app, settings, listener))
    except (SettingsError, StartError, RunnerError, TracesError) as error:
        print(f"unfog: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except GivenUpError as error:
        log.critical("%s", error)
        os._exit(1)
    # A step that hangs in the device must not keep the process: its thread cannot be joined.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__, allow_abbrev=False)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--openapi", action="store_true", help="print the API's document, and do not serve")
    instead.add_argument("--compile", action="store_true", help="compile into UNFOG_CACHE_DIR, and do not serve")
    return parser
