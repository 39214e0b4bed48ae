"""Compares with open_clip's own image transform."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from model import clip
from model.clip import EMBEDDED, Clip, ClipError, ClipNotInstalledError, name_without_folders
from model.pixels import from_pixels
from model.prompts import digit_prompt
from scripts.evaluation.captions import CAPTIONS

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def embedded() -> Clip:
    return Clip()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A small random model with larger images than those of the digits."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    return Clip(str(folder))


def drawn(channels: int, size: int, count: int = 4) -> np.ndarray:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, channels, 7, 7), dtype=np.uint8)
    return coarse.repeat(size // 7, axis=2).repeat(size // 7, axis=3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 35, 56])
def test_images_are_prepared_as_in_open_clip(larger: Clip, channels: int, size: int) -> None:
    """Pillow rounds to 8 bits after resizing, so that the embeddings differ a little."""
    images = drawn(channels, size)
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{larger.name}")
    pictures = [transform(Image.fromarray(i.transpose(1, 2, 0).squeeze())) for i in images]
    with torch.inference_mode():
        expected = F.normalize(larger.model.encode_image(torch.stack(pictures)), dim=1)
        found = larger.embed_images(from_pixels(torch.from_numpy(images)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_embeddings_have_length_1(embedded: Clip) -> None:
    images = from_pixels(torch.from_numpy(drawn(1, 28)))
    for embeddings in (embedded.embed_images(images), embedded.embed_prompts(["a seven", "?"])):
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))


def test_images_are_embedded_without_tensors_made_from_lists(embedded: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the host would wait for the device to copy each of them."""
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("made from a list"))
    assert embedded.embed_images(torch.zeros(2, 1, 28, 28)).shape[0] == 2


def test_each_digit_has_its_prompt(embedded: Clip) -> None:
    prompts = [digit_prompt(digit) for digit in range(10)]
    assert prompts[7] == "a handwritten digit seven"
    similarities = embedded.embed_prompts(prompts) @ embedded.embed_prompts(prompts).T
    assert (similarities.fill_diagonal_(0) < 0.9).all()


def test_long_prompt_is_cut_to_the_context_length(embedded: Clip) -> None:
    long = "seven " * 33
    torch.testing.assert_close(embedded.embed_prompts([long]), embedded.embed_prompts([long + "eight"]))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        (digit_prompt(7), []),
        ("A thick, slanted 7 that leans!", []),
        ("a grainy picture of the number 3, written by hand", []),
        ("a cat riding a bicycle", ["cat", "riding", "bicycle"]),
        ("a thick Cat and a thin cat", ["cat", "and"]),
        ("ein Hund", ["ein", "hund"]),
        ("seven " + "x" * 60, ["x" * 60]),
        ("🙂 ...", []),
    ],
)
def test_unknown_words_are_those_outside_of_the_training_captions(
    embedded: Clip, prompt: str, unknown: list[str]
) -> None:
    assert embedded.unknown_words([prompt]) == unknown


def test_every_training_caption_consists_of_known_words(embedded: Clip) -> None:
    assert embedded.unknown_words(CAPTIONS) == []


def test_model_that_has_learned_all_tokens_knows_every_word(larger: Clip) -> None:
    assert larger.unknown_words(["a cat riding a bicycle"]) == []


def test_missing_package_is_reported_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ClipNotInstalledError, match=r"Install it with: pip install -e '\.\[clip\]'"):
        Clip()


@pytest.mark.parametrize("name", ["missing/folder", "no-such-architecture:tag", "ViT-B-32:missing.pt"])
def test_model_that_cannot_be_loaded_raises_an_error_of_one_line(name: str) -> None:
    with pytest.raises(ClipError, match=r"^Cannot load CLIP model '") as raised:
        Clip(name)
    assert "\n" not in str(raised.value)


def test_damaged_weights_raise_an_error(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((EMBEDDED / "open_clip_config.json").read_bytes())
    weights = (EMBEDDED / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ClipError, match=r"^Cannot load CLIP model"):
        Clip(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("embedded", "embedded"),
        ("/home/me/mine/", "mine"),
        ("ViT-B-32:openai", "ViT-B-32:openai"),
        ("ViT-B-32:/home/me/a.pt", "ViT-B-32:a.pt"),
        (".", Path.cwd().name),
    ],
)
def test_shown_name_of_a_model_has_no_folders(name: str, shown: str) -> None:
    assert name_without_folders(name) == shown


def test_installed_package_is_found() -> None:
    assert clip.is_installed()
