"""Finds the name that a client probably meant."""

import difflib
from collections.abc import Iterable

MAX_LENGTH = 64  # in characters; the time of a comparison grows with the square of the length


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the most similar known name, which is in lower case, or None if no name is similar."""
    if len(name) > MAX_LENGTH:
        return None
    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1)), None)
