"""Finds the class that a prompt names.

A prompt names a class if it contains the words of its name, in any case and next to each other. A name within a longer
one does not count: "a fire truck" names the class `fire truck` and not the class `truck`. Of names with the same words,
such as `C++` and `C#`, those are named that the prompt contains exactly. So is a name that has only symbols.

For a model of digits, figures and English words name the digits. These words are numbers: the English names below, in
any case, and every word with a decimal digit. A prompt names the digit d if it contains d, as a figure or as a name,
and no other number. The same digit may occur several times.

A word is a maximal run of letters and digits. Everything else separates words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from app.engine.interface import ModelInfo
from app.tasks.labels import folded_name
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
    names = info.class_names
    labels = {names.index(prompt)} if prompt in names else _named_classes(prompt, names)
    if len(labels) == 1:
        return labels.pop()
    what_to_do = f"Name exactly one class of the model '{info.name}'. GET /models lists all {info.num_classes} names"
    if len(names) == 1:
        raise ValueError(f"The prompt must contain the only class of the model '{info.name}': {names[0]}")
    if labels:
        raise ValueError(
            f"The prompt names several classes: {_listed(names[label] for label in sorted(labels))}. {what_to_do}"
        )
    known = {name.lower(): name for name in names}
    near = next(filter(None, (nearest(word, known) for word in _words(prompt)[:MAX_COMPARED])), None)
    hint = f" Did you mean '{known[near]}'?" if near else ""
    raise ValueError(f"The prompt names no class.{hint} {what_to_do}")


def _named_classes(prompt: str, names: tuple[str, ...]) -> set[int]:
    """Returns the classes that a prompt names. The time is proportional to its number of words."""
    index, words, place = _Index.of(names), _words_of_name(prompt), 0
    named = set[tuple[str, ...]]()  # the words of the names in the prompt
    while place < len(words):
        parts = (tuple(words[place : place + length]) for length in index.lengths.get(words[place], ()))
        name = next((part for part in parts if part in index.labels), None)
        if name:
            named.add(name)
        place += len(name) if name else 1
    found = {label for label in index.without_words if names[label] in prompt}
    for alike in (index.labels[name] for name in named):  # several if the names differ only in case or symbols
        exact = [label for label in alike if names[label] in prompt] if len(alike) > 1 else []
        found.update(exact or alike)
    return found


@dataclass(frozen=True, slots=True)
class _Index:
    """The words of the names of the classes of a model."""

    labels: dict[tuple[str, ...], list[int]]  # the words of a name -> the classes with these words
    lengths: dict[str, list[int]]  # the first word of a name -> the numbers of words of such names, the largest first
    without_words: list[int]  # the classes whose names have only symbols

    @classmethod
    @lru_cache(maxsize=64)  # for each served model
    def of(cls, names: tuple[str, ...]) -> "_Index":
        labels, lengths, without_words = dict[tuple[str, ...], list[int]](), dict[str, set[int]](), list[int]()
        for label, words in enumerate(map(tuple, map(_words_of_name, names))):
            if words:
                labels.setdefault(words, []).append(label)
                lengths.setdefault(words[0], set()).add(len(words))
            else:
                without_words.append(label)
        return cls(labels, {first: sorted(own, reverse=True) for first, own in lengths.items()}, without_words)


def _words_of_name(text: str) -> list[str]:
    return _words(folded_name(text))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _is_number(word: str) -> bool:
    return word in _DIGITS or word in OTHER_NAMES or _DECIMAL.search(word) is not None


def _listed(words: Iterable[str]) -> str:
    """Returns the first different words, shortened."""
    listed = list(dict.fromkeys(words))
    short = [word if len(word) <= MAX_LENGTH else f"{word[:MAX_LENGTH]}..." for word in listed[:MAX_LISTED]]
    return ", ".join(short) + (", ..." if len(listed) > MAX_LISTED else "")
