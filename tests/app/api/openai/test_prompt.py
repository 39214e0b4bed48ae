import itertools
import re
import sys
import time
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.openai.prompt import HOW, OTHER_NAMES, description_of, digit_of, label_of_prompt
from model.prompts import DIGIT_WORDS
from tests.app.fakes import INFO

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
    assert [digit_of(description_of(INFO, digit)) for digit in range(10)] == list(range(10))


NAMES = ("cat", "dog", "fire truck", "truck", "T-shirt", "7", "caf\xe9", "C++", "C#", "Dog", "\N{CAT FACE}")
THINGS = replace(INFO, name="things", class_names=NAMES)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a cat", "cat"),
        ("a dog", "dog"),
        ("Dog", "Dog"),
        ("written in C#, please", "C#"),
        ("a \N{CAT FACE}!", "\N{CAT FACE}"),
        ("cafe\u0301", "caf\xe9"),
        ("A red fire truck, and another fire-truck", "fire truck"),
        ("a truck", "truck"),
        ("a fire and a truck", "truck"),
        ("my t-shirt", "T-shirt"),
        ("number 7 of 12", "7"),
        ("un caf\xe9", "caf\xe9"),
        (30_000 * "x " + "cat", "cat"),
    ],
)
def test_prompt_names_a_class_by_the_words_of_its_name(prompt: str, name: str) -> None:
    assert THINGS.class_names[label_of_prompt(prompt, THINGS)] == name


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("cats", "The prompt names no class. Did you mean 'cat'? Name exactly one class of the model 'things'"),
        ("a bicycle", "The prompt names no class. Name exactly one class"),
        ("", "The prompt names no class. Name"),
        ("a cat, a dog and a truck", "The prompt names several classes: cat, dog, truck. Name exactly one"),
        ("DOG!", "The prompt names several classes: dog, Dog. "),
        ("C++ or C#", "The prompt names several classes: C++, C#. "),
        ("a fire truck and a truck", "The prompt names several classes: fire truck, truck. "),
        (" ".join(map("x{}".format, range(9000))), "The prompt names no class. Name"),
    ],
)
def test_prompt_that_does_not_name_exactly_one_class_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        label_of_prompt(prompt, THINGS)


def test_time_of_a_long_prompt_does_not_depend_on_the_number_of_similar_names() -> None:
    """Counts the calls that the interpreter makes, because the time on a busy machine says little."""

    def num_calls(num_names: int) -> int:
        info = replace(INFO, class_names=tuple(f"class {number}" for number in range(num_names)))
        label_of_prompt("class 1", info)  # makes the index
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            label_of_prompt("class 5 " * 2000, info)
        finally:
            sys.setprofile(None)
        return calls

    assert num_calls(1000) < 2 * num_calls(10)


def test_digit_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The model 'default' generates only the digits 0 to 4\. Name one of them"):
        label_of_prompt("seven", replace(INFO, class_names=tuple("01234")))
