"""Finds the class that a prompt names.

A prompt names a class if it contains the words of its name, in any case and next to each other. A name within a longer
one does not count: "a fire truck" names the class `fire truck` and not the class `truck`.

For a model of digits, figures and English words name the digits. These words are numbers: the English names below, in
any case, and every word with a decimal digit. A prompt names the digit d if it contains d, as a figure or as a name,
and no other number. The same digit may occur several times.

A word is a maximal run of letters and digits. Everything else separates words.
"""

import re
from collections.abc import Iterable

from app.engine.interface import ModelInfo
from app.tasks.names import nearest
from model.prompts import DIGIT_WORDS
from model.spec import ModelSpec

OTHER_NAMES = frozenset(
    [
        *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
        *("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
        *("hundred", "thousand", "million", "billion", "trillion", "dozen"),
    ]
)
HOW = 'Write exactly one digit, as a figure or an English word, such as "7" or "a handwritten seven"'
MAX_LISTED = 5  # numbers that an error lists
MAX_COMPARED = 4  # words of a prompt that are compared with the names of the classes
MAX_LENGTH = 20  # characters of a number in an error

_DIGITS = {name: digit for digit, name in enumerate(DIGIT_WORDS)} | {str(digit): digit for digit in range(10)}
_WORD = re.compile(r"[^\W_]+")
_DECIMAL = re.compile(r"\d")


def label_of_prompt(prompt: str, info: ModelInfo) -> int:
    """Returns the class that a prompt names. Raises ValueError, with a message that says what to write."""
    if not info.has_digits:
        return _class_of(prompt, info)
    digit = digit_of(prompt)
    if digit >= info.num_classes:
        largest = info.num_classes - 1
        raise ValueError(f"The model '{info.name}' generates only the digits 0 to {largest}. Name one of them")
    return digit


def digit_of(prompt: str) -> int:
    """Returns the digit that a prompt names. Raises ValueError, with a message that says what to write."""
    numbers = [word for word in _words(prompt) if _is_number(word)]
    others = [word for word in numbers if word not in _DIGITS]
    if others:
        raise ValueError(f"The prompt contains a number that is not a single digit: {_listed(others)}. {HOW}")
    digits = sorted({_DIGITS[word] for word in numbers})
    if not digits:
        raise ValueError(f"The prompt names no digit. {HOW}")
    if len(digits) > 1:
        raise ValueError(f"The prompt names several digits: {_listed(map(str, digits))}. {HOW}")
    return digits[0]


def description_of(spec: ModelSpec, label: int) -> str:
    """Returns a prompt that describes the image of a class."""
    prompt = spec.prompts[label]
    return prompt[0].upper() + prompt[1:]


def _class_of(prompt: str, info: ModelInfo) -> int:
    words, by_first = _words(prompt), dict[str, list[tuple[list[str], int]]]()
    for label, name in enumerate(map(_words, info.class_names)):
        if name:
            by_first.setdefault(name[0], []).append((name, label))
    labels, place = set[int](), 0
    while place < len(words):
        starting = by_first.get(words[place], [])
        found = [(name, label) for name, label in starting if words[place : place + len(name)] == name]
        longest, label = max(found, key=lambda each: len(each[0]), default=([""], -1))
        if found:
            labels.add(label)
        place += len(longest)
    if len(labels) == 1:
        return labels.pop()
    what_to_do = f"Name exactly one class of the model '{info.name}'. GET /models lists all {info.num_classes} names"
    if labels:
        named = _listed(info.class_names[label] for label in sorted(labels))
        raise ValueError(f"The prompt names several classes: {named}. {what_to_do}")
    known = {name.lower(): name for name in info.class_names}
    near = next(filter(None, (nearest(word, known) for word in words[:MAX_COMPARED])), None)
    hint = f" Did you mean '{known[near]}'?" if near else ""
    raise ValueError(f"The prompt names no class.{hint} {what_to_do}")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _is_number(word: str) -> bool:
    return word in _DIGITS or word in OTHER_NAMES or _DECIMAL.search(word) is not None


def _listed(words: Iterable[str]) -> str:
    """Returns the first different words, shortened."""
    listed = list(dict.fromkeys(words))
    short = [word if len(word) <= MAX_LENGTH else f"{word[:MAX_LENGTH]}..." for word in listed[:MAX_LISTED]]
    return ", ".join(short) + (", ..." if len(listed) > MAX_LISTED else "")
