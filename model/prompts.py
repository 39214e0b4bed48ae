"""Prompts for CLIP: the default prompt of each class, and which texts are permitted.

This module does not import torch.
"""

MAX_PROMPT_LENGTH = 200
# A similarity below this share of the mean similarity of a real digit and its own prompt is low. docs/evaluation.md has
# the measurements from which it was chosen.
LEAST_SHARE = 0.25
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_prompt(digit: int) -> str:
    """Returns the prompt for an image of the digit, such as "a handwritten digit seven"."""
    return f"a handwritten digit {DIGIT_WORDS[digit]}"


def default_prompt(class_name: str) -> str:
    """Returns the prompt for an image of a class: that of the digit, or "a photo of" and the name of the class."""
    if class_name in tuple("0123456789"):
        return digit_prompt(int(class_name))
    article = "an" if class_name[0].lower() in "aeiou" else "a"
    return f"a photo of {article} {class_name}"


def is_prompt(text: str) -> bool:
    """Returns True for a text of 1 to MAX_PROMPT_LENGTH characters that is not blank and can be encoded as UTF-8."""
    return is_text(text, MAX_PROMPT_LENGTH) and bool(text.strip())


def is_text(text: str, longest: int) -> bool:
    """Returns True for a text of 1 to `longest` characters that can be encoded as UTF-8."""
    return 1 <= len(text) <= longest and not any("\ud800" <= c <= "\udfff" for c in text)
