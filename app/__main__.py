"""`python -m app`: parses the flags, configures the log, and starts the service.

The imports of the service take seconds. They are in the functions that start it, so that `--help` does not need them.
"""

import os
import signal

if __name__ == "__main__":
    # No request is accepted during the imports below, so SIGTERM can exit immediately with status 0.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

    # Open the descriptors 0 to 2 if they are closed. Otherwise the next file or socket would get such a number, and
    # text that is printed to stdout or stderr would be written to it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)

import argparse
import asyncio
import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from app.log_writer import LogWriter
from app.settings import Settings, SettingsError, flag_of, load_settings, unknown_variables, variable_of
from model.compiled.memory import keep_freed_memory, limit_primitives

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Start the service. Each setting is a flag or an environment variable: --max-batch 8 or UNFOG_MAX_BATCH=8. A flag "
    "overrides its UNFOG_* variable, and the variable overrides a file of that name in /run/secrets."
)
MIN_KEY_LENGTH = 16  # in characters; a shorter API key can be guessed
COMPILE_ONLY = object()  # means that `--compile` has no value
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells report after Ctrl-C


def main() -> None:
    """Starts the service. If the arguments or settings are invalid, prints one line and exits with status 2."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args()
    if unknown:  # Do not print the values of mistyped flags: they can be API keys.
        flags_only = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        parser.error(f"unknown arguments: {' '.join(flags_only or unknown)}")
    compile_only = arguments.compile is COMPILE_ONLY
    given = {name: getattr(arguments, name) for name in Settings.model_fields}
    flags = {name: value for name, value in given.items() if isinstance(value, str)}
    if arguments.model:
        flags["models"] = ",".join([*filter(None, [flags.get("models")]), *arguments.model])
    if arguments.openapi:
        if flags or compile_only:
            parser.error("--openapi cannot be combined with other arguments")
        from app.main import create_app

        print(json.dumps(create_app(Settings.model_construct()).openapi(), indent=2))
        return
    from app.logs import start_log

    writer = start_log()
    status = _run(writer, flags, compile_only=compile_only)
    if status or not compile_only:
        _leave(status, writer)


def _run(writer: LogWriter, flags: Mapping[str, str], *, compile_only: bool) -> int:
    """Runs the service, or only compiles, and returns the exit status."""
    from app.api.middleware.tracing import TracesError
    from app.batches.database import DatabaseError
    from app.engine.interface import RunnerError
    from app.logs import capture_stderr, configure_logging
    from app.runner.load import load_runner
    from app.server.server import GivenUpError, StartError

    try:
        settings = load_settings(flags)
        capture_stderr(configure_logging(settings.log_format, settings.log_level, writer))
        _warn(settings)
        if compile_only:
            load_runner(settings.model_copy(update={"compile": "on"}))
        else:
            _serve(settings)
    except SettingsError as error:  # It names the flag or the variable itself.
        writer.put(f"unfog: {_as_typed(str(error))}\n")
        return 2
    except (StartError, RunnerError, TracesError, DatabaseError) as error:
        writer.put(f"unfog: {_as_typed(_name_flags(str(error), flags))}\n")
        return 2
    except GivenUpError as error:
        log.critical("%s", error)
        return 1
    except KeyboardInterrupt:  # Ctrl-C before serve() installs its signal handlers
        return INTERRUPTED
    except Exception:
        log.critical("Uncaught exception", exc_info=True)
        return 1
    return 0


def _warn(settings: Settings) -> None:
    for place, key in enumerate(settings.api_keys, 1):
        if len(key) < MIN_KEY_LENGTH:
            log.warning(
                "API key is too short. Generate one with: openssl rand -hex 32",
                extra={"key": place, "min_characters": MIN_KEY_LENGTH},
            )
    for name in unknown_variables():
        log.warning("Unknown setting ignored", extra={"variable": name})


def _name_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replaces UNFOG_* names by flags for the settings that the user has given as flags."""
    for field in flags:
        message = re.sub(rf"\b{variable_of(field)}\b", flag_of(field), message)
    return message


def _as_typed(message: str) -> str:
    """Names the flag --model instead of --models if the command line has only the former."""
    flags = {argument.partition("=")[0] for argument in sys.argv}
    is_single = "--model" in flags and "--models" not in flags
    return re.sub(r"--models\b", "--model", message) if is_single else message


def _serve(settings: Settings) -> None:
    from app.main import create_app
    from app.server.server import allow_connections, bind, serve

    if not keep_freed_memory():
        log.info("Freed memory is not kept for the next step", extra={"reason": "unsupported C library"})
    limit_primitives()
    allow_connections()
    app = create_app(settings)
    listener = bind(settings.host, settings.port)
    asyncio.run(serve(app, settings, listener))


def _leave(status: int, writer: LogWriter) -> None:
    """Writes the queued log lines and exits without joining threads.

    Joining would never end if a thread hangs in the device or in the log.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # A further signal exits immediately with the same status.
        signal.signal(number, lambda *_: os._exit(status))
    writer.flush()
    os._exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without argparse's usage text, and exits with status 2."""
        print(f"unfog: {message} (list the arguments with: python -m app --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m app", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document and exit")
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--model", action="append", type=_not_empty, metavar="NAME[=PATH]", help="a model to serve (see --models)"
    )
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if name == "compile":
            settings.add_argument(
                flag_of(name),
                nargs="?",
                type=_not_empty,
                const=COMPILE_ONLY,
                metavar="MODE",
                help=f"{text}. Without a value: compile the step, store it in the cache and exit",
            )
        else:
            settings.add_argument(flag_of(name), type=_not_empty, metavar="VALUE", help=text)
    return parser


def _not_empty(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("the value must not be empty")
    return value


if __name__ == "__main__":
    main()
