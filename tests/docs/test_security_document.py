"""SECURITY.md states the limits of the code."""

import pytest

from app.api.http.animations import MAX_PENDING_PIXELS
from app.engine.clip_worker import MAX_CACHED_PROMPTS
from app.log_writer import FLUSH_SECONDS
from app.server.connection import MAX_AHEAD_BYTES
from app.server.framing import (
    MAX_CHUNK_LINE_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_LINES,
    MAX_SMALL_CHUNKS,
    SMALL_CHUNK_BYTES,
)
from app.server.server import MAX_DESCRIPTORS
from app.settings import Settings
from app.tasks.picture_files import MAX_LABEL_BYTES, MAX_TEXT_BYTES
from tests.docs.markdown import ROOT

KIB = 1024
SECURITY = (ROOT / "SECURITY.md").read_text()
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


@pytest.mark.parametrize(
    "stated",
    [
        f"the last {MAX_CACHED_PROMPTS:,} prompts",
        f"not yet encoded have at most {MAX_PENDING_PIXELS:,} pixels",
        f"a known name and at most {MAX_TEXT_BYTES:,} bytes, or {MAX_LABEL_BYTES:,} bytes",
        f"waits for it for at most {FLUSH_SECONDS:.0f} second",
        f"After more than {MAX_AHEAD_BYTES // KIB} KiB of such data",
        f"each header ({MAX_HEADER_BYTES // KIB} KiB)",
        f"their number ({MAX_LINES - 1:,})",  # the request line is one of the lines
        f"their total size ({MAX_HEAD_BYTES // KIB} KiB)",
        f"After {MAX_SMALL_CHUNKS:,} chunks with less than {SMALL_CHUNK_BYTES} bytes on average",
        f"a chunk extension of {MAX_CHUNK_LINE_BYTES // KIB} KiB",
        f"`UNFOG_MAX_BODY_BYTES` ({DEFAULTS['max_body_bytes'] // KIB} KiB)",
        f"`UNFOG_MAX_IMAGE_BYTES` ({DEFAULTS['max_image_bytes'] // KIB**2} MiB)",
        f"file descriptors, which is at most {MAX_DESCRIPTORS:,}",
    ],
)
def test_security_document_states_the_limit_of_the_code(stated: str) -> None:
    assert stated in SECURITY
