"""The header Idempotency-Key: the seed of a request without a seed follows from the key.

A retry with the same key therefore gets the same images, although the service stores nothing.
"""

from hashlib import sha256
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request

from app.api.http.requests import check_single
from app.tasks.sampling import SamplingFields
from model.png import MAX_SEED

HEADER = "Idempotency-Key"
SEED_BITS = MAX_SEED.bit_length()

_Header = Annotated[
    str,
    Header(
        alias=HEADER,
        min_length=1,
        max_length=255,
        pattern="^[ -~]+$",
        description="1 to 255 printable ASCII characters. If the request has no seed, the seed is the first 53 bits of "
        "the SHA-256 digest of this key.",
    ),
]

R = TypeVar("R", bound=SamplingFields)


async def _key(
    request: Request,
    key: _Header = None,  # type: ignore[assignment] # FastAPI does not validate the default
) -> str | None:
    check_single(request, HEADER)
    return key


IdempotencyKey = Annotated[str | None, Depends(_key)]


def seed_of(key: str) -> int:
    """Returns the seed that follows from an Idempotency-Key: the first 53 bits of its SHA-256 digest."""
    return int.from_bytes(sha256(key.encode("ascii")).digest()) >> (256 - SEED_BITS)


def with_seed(fields: R, key: str | None) -> R:
    """Returns the fields with the seed of the key, unless they have a seed of their own or there is no key."""
    if not key or "seed" in fields.model_fields_set:
        return fields
    return fields.model_copy(update={"seed": seed_of(key)})
