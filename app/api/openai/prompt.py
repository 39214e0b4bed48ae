"""Finds the digit that a prompt names.

A word is a maximal run of letters and digits. Everything else separates words. These words are numbers: the English
names below, in any case, and every word with a decimal digit. A prompt names the digit d if it contains d, as a figure
or as a name, and no other number. The same digit may occur several times.
"""

import re
from collections.abc import Iterable

from model.prompts import DIGIT_WORDS

OTHER_NAMES = frozenset(
    [
        *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
        *("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
        *("hundred", "thousand", "million", "billion", "trillion", "dozen"),
    ]
)
HOW = 'Write exactly one digit, as a figure or an English word, such as "7" or "a handwritten seven"'
MAX_LISTED = 5  # numbers that an error lists
MAX_LENGTH = 20  # characters of a number in an error

_DIGITS = {name: digit for digit, name in enumerate(DIGIT_WORDS)} | {str(digit): digit for digit in range(10)}
_WORD = re.compile(r"[^\W_]+")
_DECIMAL = re.compile(r"\d")


def digit_of(prompt: str) -> int:
    """Returns the digit that a prompt names. Raises ValueError, with a message that says what to write."""
    numbers = [word for word in map(str.lower, _WORD.findall(prompt)) if _is_number(word)]
    others = [word for word in numbers if word not in _DIGITS]
    if others:
        raise ValueError(f"The prompt contains a number that is not a single digit: {_listed(others)}. {HOW}")
    digits = sorted({_DIGITS[word] for word in numbers})
    if not digits:
        raise ValueError(f"The prompt names no digit. {HOW}")
    if len(digits) > 1:
        raise ValueError(f"The prompt names several digits: {_listed(map(str, digits))}. {HOW}")
    return digits[0]


def description_of(digit: int) -> str:
    """Returns a prompt that describes the image of a digit."""
    return f"A handwritten digit {DIGIT_WORDS[digit]}"


def _is_number(word: str) -> bool:
    return word in _DIGITS or word in OTHER_NAMES or _DECIMAL.search(word) is not None


def _listed(words: Iterable[str]) -> str:
    """Returns the first different words, shortened."""
    listed = list(dict.fromkeys(words))
    short = [word if len(word) <= MAX_LENGTH else f"{word[:MAX_LENGTH]}..." for word in listed[:MAX_LISTED]]
    return ", ".join(short) + (", ..." if len(listed) > MAX_LISTED else "")
