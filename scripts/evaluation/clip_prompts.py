"""Measures for which prompts and pictures the service warns: suitable prompts must not get a warning, others should.

A prompt is compared with ten real digits of the requested class, and a picture with its prompt. The similarity is low
if it is below LEAST_SHARE of the mean similarity of a real digit and its own prompt. Words that the model has not
learned get a warning too.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.files import write_atomically, write_json
from model.pixels import to_pixels
from model.prompts import DIGIT_WORDS, LEAST_SHARE, digit_prompt
from model.spec import EMBEDDED
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import DrawingRequest, open_drawer, options_from
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.captions import DIGIT_CAPTIONS, STATE_CAPTIONS
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.samples import balanced, check_digits, load_references
from scripts.evaluation.tables import as_table

NUM_REAL = 2_000  # real digits whose similarity to their prompts is measured
WITH_DIGIT = (  # {} is replaced by the word of the digit
    *DIGIT_CAPTIONS,
    *(f"{attribute} {{}}" for attribute in ("a thick", "a thin", "a slanted", "an upright", "a bold", "a clear")),
    *("{}", "a {} that leans", "a {} in bold strokes", "a {} in fine strokes", "a slanted, thick {}"),
)
WITHOUT_DIGIT = [
    caption for state in ("clear", "written", "bold", "fine", "slanted", "upright") for caption in STATE_CAPTIONS[state]
]
OF_NOISE = [caption for state in ("degraded", "noisy", "blurry", "static") for caption in STATE_CAPTIONS[state]]
UNRELATED = (
    *("a cat riding a bicycle", "a cat", "a dog in the park", "the Eiffel Tower at night", "a red sports car"),
    *("an astronaut riding a horse", "a bowl of fruit on a table", "a portrait of a woman", "hello world", "pizza"),
    *("mountains under a blue sky", "asdf qwer zxcv", "x", "the letter A", "a handwritten letter A", "New York"),
    *("the quick brown fox jumps over the lazy dog", "ein Hund im Garten", "une voiture rouge", "a smiling face"),
    *("a circle", "a triangle", "a black square", "a tree", "a plane in the sky", "love", "a question mark"),
    *("a house with a red door", "an oil painting of a ship in a storm", "a photo of a cat", "a bird on a branch"),
    *("a photograph of two people dancing", "a cup of coffee", "a sketch of a bridge", "a green frog", "a chair"),
    *("children playing football", "a robot with one arm", "a map of the world", "an elephant", "a heart"),
    *("a flower in a vase", "sunset over the sea", "a pair of shoes", "a portrait in the style of Van Gogh"),
    *("a Chinese character", "a musical note", "a treble clef", "a star with five points", "a banana"),
)
COLUMNS = ("compared", "pairs", "1%", "median", "99%", "low similarity", "unknown words", "warned")


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs of one kind, their similarities, and the shares that get a warning."""

    name: str
    pairs: int
    quantiles: list[float]  # 1%, 50% and 99% of the similarities
    low: float  # share with a low similarity
    unknown: float  # share with unknown words
    warned: float


def evaluate_clip_prompts(
    request: DrawingRequest,
    model: str,
    out: Path,
    reporter: Reporter,
    *,
    num_images: int,
    split: str,
    data_dir: Path,
) -> None:
    """Measures the warnings for prompts, real digits and `num_images` generated digits. Writes JSON and a table.

    Raises CheckpointError or ScriptError.
    """
    scorer, drawer = ClipScorer(model), open_drawer(request)
    check_digits(drawer)
    real = balanced(load_references(split, data_dir).held_out, NUM_REAL)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    labels = torch.arange(num_images) % NUM_CLASSES
    x_0 = drawer.draw(labels, torch.arange(num_images), options, reporter, seed=request.seed, batch_size=64)
    typical, groups = measure(scorer, real, ImageSet(to_pixels(x_0), labels))
    table = as_markdown(groups)
    reporter.line(table)
    write_atomically(out.with_suffix(".md"), table.encode())
    content = {
        **drawer.facts,
        "options": options.facts,
        "seed": request.seed,
        "num_images": num_images,
        "split": split,
        "clip": {"model": scorer.name, "weights_sha256": scorer.sha256},
        "typical": typical,
        "limit": LEAST_SHARE * typical,
        "groups": [asdict(group) for group in groups],
    }
    write_json(out, content)


def measure(scorer: ClipScorer, real: ImageSet, drawn: ImageSet) -> tuple[float, list[Group]]:
    """Returns the mean similarity of the compared digits and their own prompts, and the groups."""
    compared = torch.cat(read_compared_digits())  # (100, 1, 28, 28)
    prompts = [digit_prompt(digit) for digit in range(NUM_CLASSES)]
    similarities = scorer.similarities(compared, prompts)  # (100, 10)
    typical = similarities.view(NUM_CLASSES, -1, NUM_CLASSES).mean(dim=1).diagonal().mean().item()

    def of_prompts(name: str, pairs: Iterable[tuple[str, int]]) -> Group:
        pairs = list(pairs)
        columns = {prompt: column for column, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in pairs))}
        similarities = scorer.similarities(compared, list(columns))  # (100, P)
        best = similarities.view(NUM_CLASSES, -1, len(columns)).amax(dim=1)  # (10, P)
        of_pairs = torch.stack([best[digit, columns[prompt]] for prompt, digit in pairs])
        unknown = {prompt: bool(scorer.clip.unknown_words([prompt])) for prompt in columns}
        return _group(name, of_pairs, torch.tensor([unknown[prompt] for prompt, _ in pairs]), typical)

    def of_pictures(kind: str, digits: ImageSet) -> list[Group]:
        similarities = scorer.similarities(digits.images, prompts)  # (N, 10)
        known = torch.zeros(len(similarities), dtype=torch.bool)
        of_digit, of_next = (
            similarities.gather(1, (digits.labels + shift)[:, None] % NUM_CLASSES)[:, 0] for shift in (0, 1)
        )  # (N,) each
        return [
            _group(f"{kind} digits and their prompts", of_digit, known, typical),
            _group(f"{kind} digits and the prompt of the next digit", of_next, known, typical),
        ]

    every = range(NUM_CLASSES)
    others = [(digit, (digit + shift) % NUM_CLASSES) for digit in every for shift in every if shift]
    return typical, [
        of_prompts("prompts with the digit", _pairs(WITH_DIGIT)),
        of_prompts("prompts without a digit", _pairs(WITHOUT_DIGIT)),
        of_prompts(
            "prompts with another digit",
            ((form.format(DIGIT_WORDS[other]), digit) for form in WITH_DIGIT for digit, other in others),
        ),
        of_prompts("prompts about noise", _pairs(OF_NOISE)),
        of_prompts("unrelated prompts", _pairs(UNRELATED)),
        *of_pictures("real", real),
        *of_pictures("generated", drawn),
    ]


def read_compared_digits() -> list[Tensor]:
    """Returns the real digits of each class that ship with CLIP, uint8 (10, 1, 28, 28) each."""
    with Image.open(EMBEDDED / "digits.png") as picture:
        pixels = torch.from_numpy(np.array(picture))
    rows = rearrange(pixels, "(digit h) (n w) -> digit n 1 h w", digit=NUM_CLASSES, w=28)
    return list(rows)


def _pairs(forms: Iterable[str]) -> list[tuple[str, int]]:
    return [(form.format(DIGIT_WORDS[digit]), digit) for form in forms for digit in range(NUM_CLASSES)]


def _group(name: str, similarities: Tensor, unknown: Tensor, typical: float) -> Group:
    low = similarities < LEAST_SHARE * typical  # (N,)
    quantiles = similarities.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    shares = [share.double().mean().item() for share in (low, unknown, low | unknown)]
    return Group(name, len(similarities), quantiles, *shares)


def as_markdown(groups: list[Group]) -> str:
    """Returns a Markdown table with a row for each group."""
    rows = [
        [group.name, f"{group.pairs:,}", *(f"{value:.2f}" for value in group.quantiles)]
        + [f"{share:.1%}" for share in (group.low, group.unknown, group.warned)]
        for group in groups
    ]
    return as_table(COLUMNS, rows)
