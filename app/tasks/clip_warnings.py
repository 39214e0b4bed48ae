"""Warnings about prompts that probably do not have the effect that the user expects.

CLIP computes a similarity for any text, also for one about things that it has never seen. A prompt is compared with
real digits, because their similarity to a suitable prompt is known.
"""

from collections.abc import Sequence

from app.engine.clip_worker import Scores
from model.prompts import LEAST_SHARE

MAX_NAMED = 5  # the largest number of words, and of positions, in a warning


def prompt_warning(unknown_words: Sequence[str], digit: str, similarities: tuple[float, float] | None) -> str | None:
    """Returns the warning for the prompt of CLIP guidance for this class, or None.

    `similarities` is the result of ClipWorker.compare_with_real_digits, or None if the similarity is not known.
    """
    warnings = _about_words(unknown_words)
    if similarities and similarities[0] < LEAST_SHARE * similarities[1]:
        best, typical = similarities
        warnings.append(
            f"The prompt does not describe the digit {digit}: its similarity to real images of it is at most "
            f"{best:.2f}. The mean for real digits and their own prompts is {typical:.2f}"
        )
    return ". ".join(warnings) or None


def score_warning(scores: Scores, unknown_words: Sequence[str]) -> str | None:
    """Returns the warning for pictures to which none of the prompts is similar, or None."""
    warnings = _about_words(unknown_words)
    best = scores.similarities.max(axis=1)  # (N,)
    limit = LEAST_SHARE * scores.typical
    if positions := [str(index) for index, similarity in enumerate(best) if similarity < limit]:
        warnings.append(
            f"None of the prompts describes these images (by position, from 0): {_listed(positions)}. Their highest "
            f"similarity is below {limit:.2f}. The mean for real digits and their own prompts is {scores.typical:.2f}"
        )
    return ". ".join(warnings) or None


def _about_words(unknown: Sequence[str]) -> list[str]:
    return [f"The CLIP model has not learned these words: {_listed(unknown)}"] if unknown else []


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return ", ".join(texts[:MAX_NAMED]) + more
