import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import checkpoint
from model.clip_guidance import ClipGuidance
from model.prompts import digit_prompt
from model.sampler import Guidance
from model.spec import SHIPPED, SHIPPED_FAST
from scripts import make_dataset
from scripts.common.drawing import ClipOptions, DrawingOptions, DrawingRequest
from scripts.evaluation.dataset_card import card, command_of
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

FACTS = {
    "weights_sha256": "ab" * 32,
    "device": "cpu",
    "dtype": "bfloat16",
    "compiled": True,
    "options": {"sampler": "ddim", "num_steps": 4, "guidance": {"scale": 1.0, "start": 1, "stop": 100}},
    "seed": 3,
    "count": 7,
    "format": "idx",
    "num_images": [0, 3, 0, 0, 0, 0, 0, 0, 0, 4],
}


@dataclass(frozen=True, slots=True)
class LaterRequest(DrawingRequest):
    """A request with options that do not exist yet."""

    prompt: str | None = None
    model: Path | None = None


@pytest.mark.parametrize(
    ("count", "category"),
    [
        *((1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (60_000, "10K<n<100K"), (100_000, "100K<n<1M")),
        (1_000_000, "1M<n<10M"),
    ],
)
def test_size_category_matches_the_number_of_images(tmp_path: Path, count: int, category: str) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    facts = {**FACTS, "count": count, "num_images": [count, *[0] * 9]}
    assert yaml.safe_load(card(facts, loaded, "command").split("---\n")[1])["size_categories"] == [category]


DIGIT_PROMPTS = ", ".join(f'"{digit_prompt(digit)}"' for digit in range(10))


@pytest.mark.parametrize(("prompt", "stated"), [("a | b", '"a \\| b"'), (None, DIGIT_PROMPTS)])
def test_clip_guidance_is_stated(tmp_path: Path, prompt: str | None, stated: str) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    guidance = {"scale": 1.5, "start": 5, "stop": 60}
    clip = {"guidance": guidance, "prompt": prompt, "model": "embedded", "sha256": "c" * 64}
    text = card({**FACTS, "options": {**FACTS["options"], "clip": clip}}, loaded, "command")
    assert "| CLIP guidance | scale 1.5 at t = 5 to 60 |" in text
    assert f"| prompt | {stated} |" in text
    assert f"| SHA-256 of the CLIP weights | `{'c' * 64}` |" in text
    assert "CLIP" not in card(FACTS, loaded, "command")


@pytest.mark.parametrize(("name", "shown"), [("/home/me/mine", "mine"), ("ViT-B-32:/home/me/a.pt", "ViT-B-32:a.pt")])
def test_card_names_a_clip_model_without_its_folders(tmp_path: Path, name: str, shown: str) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    clip = ClipOptions(ClipGuidance(1.5), "one", name, "c" * 64)
    facts = {**FACTS, "options": DrawingOptions("ddim", 4, Guidance(), clip).facts}
    command = command_of(DrawingRequest(clip_guidance_scale=1.5, clip_prompt="one", clip_model=name), facts)
    text = card(facts, loaded, command)
    assert f'| CLIP model | "{shown}" |' in text
    assert f"--clip-model {shown}" in command
    assert "/home" not in text


def test_prompt_with_backticks_does_not_end_the_code_block_of_the_command(tmp_path: Path) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    prompt = "a ````` seven"
    clip = ClipOptions(ClipGuidance(1.5), prompt, "embedded", "c" * 64)
    facts = {**FACTS, "options": DrawingOptions("ddim", 4, Guidance(), clip).facts}
    command = command_of(DrawingRequest(clip_guidance_scale=1.5, clip_prompt=prompt), facts)
    fence = "`" * 6  # a fence ends a block only if it has at least as many backticks as the one that opened it
    assert f"\n{fence}bash\n{command}\n{fence}\n" in card(facts, loaded, command)


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_FAST])
def test_command_names_a_shipped_checkpoint_by_its_path_in_the_repository(path: Path) -> None:
    assert f"--checkpoint model/weights/{path.name} " in command_of(DrawingRequest(path), FACTS)


def test_command_has_no_absolute_path_and_keeps_all_options_that_change_images(tmp_path: Path) -> None:
    request: dict[str, Any] = {"checkpoint": tmp_path / "mine.safetensors", "guidance_scale": 2.5, "num_steps": 4}
    unused = {"batch_size": 7, "num_threads": 1}
    later = LaterRequest(**request, **unused, prompt="it's a seven", model=tmp_path / "clip")
    words = shlex.split(command_of(later, {**FACTS, "min_confidence": 0.9}))
    assert words == [
        *("python", "-m", "scripts.make_dataset", "--out", "out/set", "--format", "idx", "--balance", "1=3,9=4"),
        *("--checkpoint", "mine.safetensors", "--num-steps", "4", "--guidance-scale", "2.5"),
        *("--prompt", "it's a seven", "--model", "clip", "--seed", "3", "--compile", "on", "--min-confidence", "0.9"),
    ]
    make_dataset.build_parser().parse_args(shlex.split(command_of(DrawingRequest(**request, **unused), FACTS))[3:])
