"""Starts the service. Each setting is a flag or an UNFOG_* variable; a flag wins over its variable."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from app.api.middleware.tracing import TracesError
from app.engine.interface import RunnerError
from app.log_writer import LogWriter
from app.logs import capture_stderr, configure_logging, start_log
from app.main import create_app
from app.runner.runner import Runner
from app.server.server import GivenUpError, StartError, allow_connections, bind, serve
from app.settings import Settings, SettingsError, flag_of, load_settings, unknown_variables
from model.compiled.memory import keep_freed_memory

log = logging.getLogger(__name__)

MIN_KEY_LENGTH = 16  # shorter keys can be guessed
COMPILE_ONLY = object()  # `--compile` without a value
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells report after Ctrl-C


def main() -> None:
    """Parses the arguments and serves. If that is not possible, prints one line and exits with status 2."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args()
    if unknown:  # without the values of mistyped flags, which may be keys
        flags_only = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        parser.error(f"unknown arguments: {' '.join(flags_only or unknown)}")
    compile_only = arguments.compile is COMPILE_ONLY
    given = {name: getattr(arguments, name) for name in Settings.model_fields}
    flags = {name: value for name, value in given.items() if isinstance(value, str)}
    if arguments.openapi:
        if flags or compile_only:
            parser.error("--openapi takes no other argument")
        print(json.dumps(create_app(Settings.model_construct()).openapi(), indent=2))
        return
    writer = start_log()
    status = _run(writer, flags, compile_only=compile_only)
    if status or not compile_only:
        _leave(status, writer)


def _run(writer: LogWriter, flags: Mapping[str, str], *, compile_only: bool) -> int:
    """Serves or compiles, and returns the exit status."""
    try:
        settings = load_settings(flags)
        capture_stderr(configure_logging(settings.log_format, settings.log_level, writer))
        _warn(settings)
        if compile_only:
            Runner.load(settings.model_copy(update={"compile": "on"}))
        else:
            _serve(settings)
    except (SettingsError, StartError, RunnerError, TracesError) as error:
        writer.put(f"unfog: {error}\n")
        return 2
    except GivenUpError as error:
        log.critical("%s", error)
        return 1
    except KeyboardInterrupt:  # before serve() handles signals
        return INTERRUPTED
    except Exception:
        log.critical("Uncaught exception", exc_info=True)
        return 1
    return 0


def _warn(settings: Settings) -> None:
    for place, key in enumerate(settings.api_keys, 1):
        if len(key) < MIN_KEY_LENGTH:
            log.warning(
                "UNFOG_API_KEYS: key %d is shorter than %d characters. Generate one with: openssl rand -hex 32",
                place,
                MIN_KEY_LENGTH,
            )
    for name in unknown_variables():
        log.warning("Unknown setting %s: ignored", name)


def _serve(settings: Settings) -> None:
    if not keep_freed_memory():
        log.info("This C library cannot keep freed memory for the next step, so steps take slightly longer")
    allow_connections()
    app = create_app(settings)
    listener = bind(settings.host, settings.port)
    asyncio.run(serve(app, settings, listener))


def _leave(status: int, writer: LogWriter) -> None:
    """Writes the queued log lines and exits without joining threads.

    A thread that hangs in the device or in the log would keep the process alive.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # a further signal exits at once with the same status
        signal.signal(number, lambda *_: os._exit(status))
    writer.flush()
    os._exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one sentence, without the usage of all flags before it; exit status 2."""
        print(f"unfog: {message} (--help shows all arguments)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m app", description=__doc__, allow_abbrev=False)
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document and exit")
    settings = parser.add_argument_group("settings")
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if name == "compile":
            settings.add_argument(
                flag_of(name),
                nargs="?",
                type=_not_empty,
                const=COMPILE_ONLY,
                metavar="MODE",
                help=f"{text}. Without a value: compile the step into the cache and exit",
            )
        else:
            settings.add_argument(flag_of(name), type=_not_empty, metavar="VALUE", help=text)
    return parser


def _not_empty(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("the value is empty")
    return value
