"""Logging: lines for people on a terminal, JSON lines elsewhere, where what is passed as `extra` becomes a field."""

import asyncio
import logging
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# Of a request's line, what a person at a terminal does not look for.
_NOT_FOR_PEOPLE = (
    *("logger", "color_message", "client", "route", "trace_id", "span_id"),
    *("model", "seed", "num_steps", "sampler", "guidance_scale"),
)
PROTOCOL_LOGGER = "uvicorn.error.protocol"  # which connections of ours use
_FIRST = ("time", "level", "logger", "message")


def configure_logging(log_format: str, level: str) -> None:
    """Sends all logs to stderr; `auto` is console on a terminal and JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    facts: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper("%H:%M:%S" if console else "iso", utc=not console, key="time"),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=facts,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_for_people(sys.stderr.isatty()) if console else _for_machines()),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True  # ours carries the request id
    for name in ("uvicorn.error", PROTOCOL_LOGGER):
        logging.getLogger(name).addFilter(is_no_cancellation)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # ours says what matters


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """What is cut off at the end, when the time for the last answers is over, is in order: no error, no traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)) and (
        "asyncio.exceptions.CancelledError" not in record.getMessage()
    )


def _for_machines() -> list[Processor]:
    return [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        _in_order,
        structlog.processors.JSONRenderer(),
    ]


def _for_people(colours: bool) -> list[Processor]:
    plain = structlog.dev.plain_traceback
    return [
        _without(*_NOT_FOR_PEOPLE),
        structlog.dev.ConsoleRenderer(
            colors=colours, pad_event_to=0, timestamp_key="time", exception_formatter=plain, sort_keys=False
        ),
    ]


def _in_order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What every line has comes first."""
    event.pop("color_message", None)  # uvicorn's, for its own console
    return {name: event.pop(name) for name in _FIRST} | dict(event)


def _without(*names: str) -> Processor:
    def drop(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {name: value for name, value in event.items() if name not in names}

    return drop
