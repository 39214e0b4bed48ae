"""What an error says about a name that is not known: the permitted names, or the one that was probably meant."""

import difflib
from collections.abc import Iterable

MAX_LENGTH = 32  # in characters; the time of a comparison grows with the square of the length


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the most similar known name, or None if none is similar. The known names must be in lower case."""
    if len(name) > MAX_LENGTH:
        return None
    short = [each for each in known if len(each) <= MAX_LENGTH]
    return next(iter(difflib.get_close_matches(name.lower(), short, n=1)), None)


def either(values: Iterable[str]) -> str:
    """Returns the values in quotation marks, joined by "or"."""
    return " or ".join(f"'{value}'" for value in values)
