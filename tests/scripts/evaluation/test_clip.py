import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.clip import EMBEDDED
from model.prompts import digit_prompt
from scripts.common.data.data_set import ImageSet
from scripts.common.errors import ScriptError
from scripts.common.mnist import load_mnist
from scripts.evaluation.captions import CLEAR, NOISY
from scripts.evaluation.clip import ClipScorer, ClipScores, as_json, as_markdown, noised
from scripts.evaluation.clip_training import EPOCHS, MODEL
from tests.scripts.evaluation.bars import bars

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer()


def test_similarities_equal_those_of_open_clip(scorer: ClipScorer) -> None:
    """Computes the expected values as in the README of open_clip: transform, encode, normalise, multiply."""
    images, prompts = bars(3, 0).images, ["a handwritten digit three", "random noise"]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{EMBEDDED}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{EMBEDDED}")
    with torch.inference_mode():
        pictures = model.eval().encode_image(torch.stack([transform(Image.fromarray(i[0].numpy())) for i in images]))
        texts = model.encode_text(tokenizer(prompts))
    pictures, texts = (x / x.norm(dim=1, keepdim=True) for x in (pictures, texts))
    torch.testing.assert_close(scorer.similarities(images, prompts), pictures @ texts.T, rtol=0, atol=1e-5)


def test_shipped_clip_is_smaller_than_6_mb() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 6_000_000


def test_shipped_clip_states_its_recipe_and_accuracy() -> None:
    facts = json.loads((EMBEDDED / "open_clip_config.json").read_text())
    assert (facts["training"]["epochs"], facts["training"]["seed"]) == (EPOCHS, 0)
    for name in ("validation", "test"):
        assert min(facts["training"][name].values()) >= 0.98
    assert facts["model_cfg"] == MODEL


class FixedScorer(ClipScorer):
    """Returns given similarities."""

    def __init__(self, similarities: torch.Tensor) -> None:
        self.name, self.sha256, self.given = "fixed", "0" * 64, similarities

    def similarities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert prompts == [*map(digit_prompt, range(10)), CLEAR, NOISY]
        return self.given


def test_scores_are_shares_of_the_pictures() -> None:
    given = torch.zeros(4, 12)
    given[0, 0], given[1, 1], given[2, 7], given[3, 3] = (
        0.5,
        0.5,
        0.5,
        0.5,
    )  # the third picture, a 2, is most similar to the prompt of 7
    given[:, 10] = torch.tensor([0.4, 0.4, 0.4, 0.1])
    given[:, 11] = 0.2
    scores = FixedScorer(given).score(bars(4, 0))
    assert scores == ClipScores(recognised=0.75, clear=0.75, similarity=pytest.approx(0.375))


def test_results_have_generated_and_real_digits() -> None:
    drawn, real = ClipScores(0.5, 0.25, 0.125), ClipScores(1.0, 0.75, 0.5)
    scorer = FixedScorer(torch.empty(0))
    assert as_json(scorer, drawn, real, 0.875)["real"] == {
        "recognised": 1.0,
        "clear": 0.75,
        "similarity": 0.5,
        "tells_noise": 0.875,
    }
    lines = as_markdown(scorer, drawn, real, 0.875).splitlines()
    assert lines[0] == "| CLIP fixed: recognised as asked | 50.00% | 100.00% |"


class ConstantScorer(FixedScorer):
    """Returns the same similarities for each picture."""

    def similarities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.given.expand(len(images), -1)


@pytest.mark.parametrize("place", [10, 11])
def test_accuracy_of_clear_or_noisy_is_half_for_a_constant_answer(place: int) -> None:
    always = torch.zeros(1, 12)
    always[0, place] = 1.0
    scorer, digits = ConstantScorer(always), bars(100, 0)
    assert scorer.tells_noise(digits, scorer.score(digits)) == 0.5


def test_noised_digits_go_from_timestep_20_to_100() -> None:
    digits = bars(162, 0)
    x_0, x_t = digits.images.float(), noised(digits).images.float()
    difference = (x_t - x_0).square().mean(dim=(1, 2, 3))  # (162,)
    assert torch.equal(noised(digits).images, noised(digits).images)
    assert difference[0] > 0  # the pictures with t = 20
    assert difference[:10].max() < difference[71:81].min()  # the pictures with t = 91 to 100
    assert difference[81:91].max() < difference[152:].min()  # t starts at 20 again


@pytest.mark.parametrize("name", ["nowhere", "ViT-B-32:no/such/file.pt", "no-such-model:openai"])
def test_missing_model_gives_an_error_of_one_line(name: str) -> None:
    with pytest.raises(ScriptError, match="Cannot load CLIP model") as caught:
        ClipScorer(name)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_in_a_file_are_loaded_for_the_named_architecture(tmp_path: Path) -> None:
    """Weights of OpenAI and LAION are downloaded as files. The test uses random weights of a tiny architecture."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-test-model.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.CLIP(**architecture)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    scorer = ClipScorer(f"tiny-test-model:{tmp_path / 'weights.pt'}")
    assert torch.equal(scorer.clip.model.visual.conv1.weight, model.visual.conv1.weight)
    assert scorer.similarities(bars(2, 0).images, ["a dog", "a cat"]).shape == (2, 2)


@pytest.mark.slow
def test_shipped_clip_recognises_real_digits_and_noise(scorer: ClipScorer, mnist_dir: Path) -> None:
    images, labels = load_mnist("test", mnist_dir)
    digits = ImageSet(images, labels)
    scores = scorer.score(digits)
    recognised, told = scores.recognised, scorer.tells_noise(digits, scores)
    assert min(recognised, told) >= 0.99
    written = json.loads((EMBEDDED / "open_clip_config.json").read_text())["training"]["test"]
    assert written == {"recognised": pytest.approx(recognised, abs=2e-3), "tells_noise": pytest.approx(told, abs=2e-3)}
