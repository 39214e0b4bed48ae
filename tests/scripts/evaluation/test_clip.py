import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts.common.errors import ScriptError
from scripts.common.mnist import load_mnist
from scripts.evaluation.captions import CLEAR, NOISY, digit_prompt
from scripts.evaluation.clip import EMBEDDED, ClipScorer, ClipScores, as_json, as_markdown, noised
from scripts.evaluation.clip_training import EPOCHS, MODEL
from scripts.evaluation.samples import Digits
from tests.scripts.evaluation.bars import bars

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer()


def test_similarities_are_the_librarys_own(scorer: ClipScorer) -> None:
    """By the path that its README shows: transform, encode, normalise, multiply."""
    images, prompts = bars(3, 0).images, ["a handwritten digit three", "random noise"]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{EMBEDDED}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{EMBEDDED}")
    with torch.inference_mode():
        pictures = model.eval().encode_image(torch.stack([transform(Image.fromarray(i[0].numpy())) for i in images]))
        texts = model.encode_text(tokenizer(prompts))
    pictures, texts = (x / x.norm(dim=1, keepdim=True) for x in (pictures, texts))
    torch.testing.assert_close(scorer.similarities(images, prompts), pictures @ texts.T, rtol=0, atol=1e-5)


def test_it_needs_no_network_and_few_bytes() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 6_000_000


def test_what_ships_says_by_which_recipe_and_how_well_it_learned() -> None:
    facts = json.loads((EMBEDDED / "open_clip_config.json").read_text())
    assert (facts["training"]["epochs"], facts["training"]["seed"]) == (EPOCHS, 0)
    for name in ("validation", "test"):
        assert min(facts["training"][name].values()) >= 0.98
    assert facts["model_cfg"] == MODEL


class Told(ClipScorer):
    """Sees what it is told to see."""

    def __init__(self, similarities: torch.Tensor) -> None:
        self.name, self.sha256, self.told = "told", "0" * 64, similarities

    def similarities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert prompts == [*map(digit_prompt, range(10)), CLEAR, NOISY]
        return self.told


def test_scores_are_shares_of_the_pictures() -> None:
    told = torch.zeros(4, 12)
    told[0, 0], told[1, 1], told[2, 7], told[3, 3] = 0.5, 0.5, 0.5, 0.5  # the third is a 2 that looks like a 7
    told[:, 10] = torch.tensor([0.4, 0.4, 0.4, 0.1])
    told[:, 11] = 0.2
    scores = Told(told).score(bars(4, 0))
    assert scores == ClipScores(recognised=0.75, clear=0.75, similarity=pytest.approx(0.375))


def test_drawn_digits_stand_beside_real_ones() -> None:
    drawn, real = ClipScores(0.5, 0.25, 0.125), ClipScores(1.0, 0.75, 0.5)
    scorer = Told(torch.empty(0))
    assert as_json(scorer, drawn, real, 0.875)["real"] == {
        "recognised": 1.0,
        "clear": 0.75,
        "similarity": 0.5,
        "tells_noise": 0.875,
    }
    lines = as_markdown(scorer, drawn, real, 0.875).splitlines()
    assert lines[0] == "| CLIP told: names the digit, of ten | 50.00% | 100.00% |"


class CallsAll(Told):
    """Calls each picture the same."""

    def similarities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.told.expand(len(images), -1)


@pytest.mark.parametrize("place", [10, 11])
def test_who_calls_all_clear_or_all_noisy_tells_nothing(place: int) -> None:
    always = torch.zeros(1, 12)
    always[0, place] = 1.0
    scorer, digits = CallsAll(always), bars(100, 0)
    assert scorer.tells_noise(digits, scorer.score(digits)) == 0.5


def test_noised_digits_go_from_step_20_to_static() -> None:
    digits = bars(162, 0)
    x_0, x_t = digits.images.float(), noised(digits).images.float()
    difference = (x_t - x_0).square().mean(dim=(1, 2, 3))  # (162,)
    assert torch.equal(noised(digits).images, noised(digits).images)
    assert difference[0] > 0  # t = 20
    assert difference[:10].max() < difference[71:81].min()  # t = 91 to 100
    assert difference[81:91].max() < difference[152:].min()  # and again from 20


@pytest.mark.parametrize("name", ["nowhere", "ViT-B-32:no/such/file.pt", "no-such-model:openai"])
def test_a_model_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(ScriptError, match="no CLIP model") as caught:
        ClipScorer(name)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_in_a_file_are_loaded_for_the_architecture_that_is_named(tmp_path: Path) -> None:
    """As a person has them who downloaded OpenAI's or LAION's; here random ones of a tiny architecture of colour."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-of-the-tests.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.CLIP(**architecture)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    scorer = ClipScorer(f"tiny-of-the-tests:{tmp_path / 'weights.pt'}")
    assert torch.equal(scorer.model.visual.conv1.weight, model.visual.conv1.weight)
    assert scorer.similarities(bars(2, 0).images, ["a dog", "a cat"]).shape == (2, 2)


def test_the_one_that_ships_knows_real_digits_and_tells_clear_from_noisy(scorer: ClipScorer, mnist_dir: Path) -> None:
    images, labels = load_mnist("test", mnist_dir)
    digits = Digits(images, labels)
    scores = scorer.score(digits)
    recognised, told = scores.recognised, scorer.tells_noise(digits, scores)
    assert min(recognised, told) >= 0.99
    written = json.loads((EMBEDDED / "open_clip_config.json").read_text())["training"]["test"]
    assert written == {"recognised": pytest.approx(recognised, abs=2e-3), "tells_noise": pytest.approx(told, abs=2e-3)}
