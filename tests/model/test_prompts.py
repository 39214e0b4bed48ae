import pytest

from model.prompts import default_prompt, is_prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", True),
        ("a" * 200, True),
        ("七 \U0001f600", True),
        ("", False),
        (" \n", False),
        ("a" * 201, False),
        ("\ud800", False),
        ("a\udfff", False),
    ],
)
def test_prompt_has_1_to_200_characters_and_is_not_blank(text: str, expected: bool) -> None:
    assert is_prompt(text) == expected


@pytest.mark.parametrize(
    ("class_name", "prompt"),
    [
        ("7", "a handwritten digit seven"),
        ("truck", "a photo of a truck"),
        ("Airplane", "a photo of an Airplane"),
        ("10", "a photo of a 10"),
    ],
)
def test_default_prompt_describes_an_image_of_the_class(class_name: str, prompt: str) -> None:
    assert default_prompt(class_name) == prompt
