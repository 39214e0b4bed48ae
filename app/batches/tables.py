"""The tables of files and batches.

A file is stored in chunks. The output and the error file of a batch have no chunks: their content is the results of the
lines of the batch. A line with a result is therefore in exactly one of the two files.

Times are seconds since the epoch.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(naming_convention={"ix": "%(table_name)s_%(column_0_name)s"})

# An upload that is not finished has the status `uploading` and is in no list.
files = Table(
    "unfog_files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(32), nullable=False),  # the digest of the API key; empty without API keys
    Column("filename", Text, nullable=False),
    Column("purpose", String(20), nullable=False),
    Column("status", String(12), nullable=False),  # uploading or processed
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("batch_id", String(40)),  # of an output or error file
    Column("is_error", Integer, nullable=False, default=0),  # 1 for an error file
    Index(None, "owner", "created_at"),
    Index(None, "expires_at"),
    Index(None, "batch_id"),
)

chunks = Table(
    "unfog_chunks",
    metadata,
    Column("file_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

batches = Table(
    "unfog_batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(32), nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", String(40), nullable=False),
    Column("status", String(12), nullable=False),
    Column("metadata", JSON),
    Column("output_lifetime", BigInteger),  # seconds
    Column("webhook_url", Text),
    Column("errors", JSON),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    *(
        Column(f"{name}_at", Double)
        for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    ),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),
    Column("failed", Integer, nullable=False, default=0),
    Column("images", BigInteger, nullable=False, default=0),  # in the answers
    Column("result_bytes", BigInteger, nullable=False, default=0),
    Column("input_bytes", BigInteger, nullable=False),  # about the size of the copied lines; 0 after the end
    Column("claimed_by", String(32)),  # the worker that validates the batch or ends it
    Index(None, "owner", "created_at"),
    Index(None, "status"),
)

# The state of a line is `waiting`, `completed` or `failed`. A waiting line with a worker in `claimed_by` is running.
lines = Table(
    "unfog_lines",
    metadata,
    Column("batch_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the line in the file, from 1
    Column("custom_id", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("state", String(9), nullable=False),
    Column("claimed_by", String(32)),
    Column("result", LargeBinary),  # a line of the output or the error file
    Index(None, "batch_id", "state", "number"),
)
_is_claimed = lines.c.claimed_by.is_not(None)
Index(None, lines.c.claimed_by, sqlite_where=_is_claimed, postgresql_where=_is_claimed)

webhooks = Table(
    "unfog_webhooks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("url", Text, nullable=False),
    Column("event", String(40), nullable=False),
    Column("batch_id", String(40), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Double, nullable=False),
    Column("claimed_by", String(32)),
    Column("claimed_until", Double, nullable=False, default=0.0),
    Index(None, "next_at"),
)

# A claim of a worker ends if the worker has not been seen for LEASE_SECONDS (see batches.py).
workers = Table(
    "unfog_workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("seen_at", Double, nullable=False),
)
