"""Reads the fields of captured log lines."""

import pytest


def logged_field(caplog: pytest.LogCaptureFixture, event: str, field: str = "reason") -> str:
    """Returns a field of the only log line that starts with this event."""
    (record,) = (record for record in caplog.records if record.getMessage().startswith(event))
    return str(vars(record)[field])
