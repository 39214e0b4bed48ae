import itertools
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.openai.prompt import HOW, OTHER_NAMES, description_of, digit_of
from model.prompts import DIGIT_WORDS

PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=300)
WORDS = [
    "a",
    "handwritten",
    "please",
    "draw",
    "sevens",
    "fourth",
    "zéro",
    "\u017fix",
    "on",
    "Ⅶ",
    "²",
    "tenth",
    "no",
    "",
]
PUNCTUATION = [
    " ",
    "!",
    ", ",
    ".\n",
    "_",
    "-",
    "'",
    "\t",
    "\x00",
    "\u2014",
    "#",
    '"',
    "\u200b",
    "\N{SNOWMAN}",
    "(",
    "/",
]


def expected(prompt: str) -> int | None:
    """Returns the digit of a prompt, or None if it must be refused. It follows the rules in the documentation."""
    numbers: list[int | None] = []
    for is_word, characters in itertools.groupby(prompt, str.isalnum):
        word = "".join(characters)
        folded = "".join(chr(ord(each) + 32) if "A" <= each <= "Z" else each for each in word)
        if not is_word:
            continue
        if len(word) == 1 and word in "0123456789":
            numbers.append(ord(word) - ord("0"))
        elif folded in DIGIT_WORDS:
            numbers.append(DIGIT_WORDS.index(folded))
        elif folded in OTHER_NAMES or any(unicodedata.category(each) == "Nd" for each in word):
            numbers.append(None)
    found = set(numbers)
    return found.pop() if len(found) == 1 else None


def understood(prompt: str) -> int | None:
    try:
        return digit_of(prompt)
    except ValueError as error:
        assert str(error).endswith(HOW)
        assert len(str(error)) < 400
        return None


@st.composite
def mixed_case(draw: st.DrawFn, word: str) -> str:
    upper = draw(st.lists(st.booleans(), min_size=len(word), max_size=len(word)))
    return "".join(each.upper() if is_upper else each for each, is_upper in zip(word, upper, strict=True))


@PROFILE
@given(st.data(), st.integers(0, 9), st.booleans())
def test_one_digit_is_understood_in_any_case_and_punctuation(data: st.DataObject, digit: int, is_figure: bool) -> None:
    word = str(digit) if is_figure else data.draw(mixed_case(DIGIT_WORDS[digit]))
    around = st.lists(st.sampled_from([each for each in WORDS if each != "²"]), max_size=4)
    separator = st.sampled_from(PUNCTUATION)
    words = [*data.draw(around), word, *data.draw(around)]
    prompt = "".join(each + data.draw(separator) for each in words)
    assert digit_of(prompt) == digit


PARTS = [*DIGIT_WORDS, *WORDS, *PUNCTUATION, *"0123789", "17", "7th", "\u0667", "ten"]


@PROFILE
@given(st.lists(st.sampled_from(PARTS), max_size=8))
def test_every_other_prompt_is_refused(parts: list[str]) -> None:
    prompt = "".join(parts)
    assert understood(prompt) == expected(prompt)


@PROFILE
@given(st.text(max_size=30))
def test_every_prompt_is_read_according_to_the_rules(prompt: str) -> None:
    assert understood(prompt) == expected(prompt)


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("7", 7),
        ("Seven!", 7),
        ("a handwritten seven, please", 7),
        ("-7", 7),
        ("#7", 7),
        ("'Nine'", 9),
        ("seven's", 7),
        ("the digit_0", 0),
        ("a 7, that is a seven", 7),
        ("0\x00", 0),
        ("SIX", 6),
    ],
)
def test_prompt_with_one_digit_gives_this_digit(prompt: str, digit: int) -> None:
    assert digit_of(prompt) == expected(prompt) == digit


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a cat", "names no digit"),
        ("", "names no digit"),
        ("sevens", "names no digit"),
        ("SİX", "names no digit"),
        ("7 or 8", "names several digits: 7, 8."),
        ("draw one seven", "names several digits: 1, 7."),
        ("7.5", "names several digits: 5, 7."),
        ("17", "not a single digit: 17."),
        ("77", "not a single digit: 77."),
        ("7th", "not a single digit: 7th."),
        ("07", "not a single digit: 07."),
        ("seventeen", "not a single digit: seventeen."),
        ("twenty-seven", "not a single digit: twenty."),
        ("a 7 of 28x28 pixels", "not a single digit: 28x28."),
        ("\uff17", "not a single digit: \uff17."),
        ("7" * 32_000, "not a single digit: 77777777777777777777..."),
        (" ".join(map(str, range(10, 99))), "not a single digit: 10, 11, 12, 13, 14, ..."),
    ],
)
def test_prompt_with_no_or_several_digits_is_refused_with_its_numbers(prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match="Write exactly one digit") as refused:
        digit_of(prompt)
    assert reason in str(refused.value)


def test_time_is_linear_in_the_length_of_the_prompt() -> None:
    """A quadratic search would take minutes."""
    start = time.monotonic()
    for pattern in ("7", "7 ", "seven", "se ", "\u0301", "_", "\U0001d7d5"):
        understood(pattern * 200_000)
    assert time.monotonic() - start < 20


def test_description_of_a_digit_is_a_prompt_for_it() -> None:
    assert [digit_of(description_of(digit)) for digit in range(10)] == list(range(10))
