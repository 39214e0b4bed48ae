import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from scripts.common import mnist
from scripts.common.errors import ScriptError
from scripts.evaluation import classifiers
from scripts.evaluation.classifiers import (
    DIGITS_SHAPE,
    KINDS,
    METADATA_KEY,
    ColourJudge,
    Shape,
    accuracy,
    features_of,
    judge_for,
    load_classifier,
    probabilities_of,
    recognise,
    save_classifier,
)
from tests.scripts.evaluation.bars import bars

EVERY_KIND = pytest.mark.parametrize("kind", sorted(KINDS))
FACTS = {"test_accuracy": 0.25, "epochs": 3}


@torch.inference_mode()
@EVERY_KIND
def test_features_and_head_give_the_logits_of_the_network(kind: str) -> None:
    network, images = KINDS[kind](DIGITS_SHAPE).eval(), bars(20, 0).images
    features = features_of(network, images)
    assert features.shape == (20, network.num_features)
    logits = network(images / 255)
    torch.testing.assert_close(logits, network.head(features))
    torch.testing.assert_close(probabilities_of(network, images), logits.softmax(dim=1))
    assert torch.equal(recognise(network, images), logits.argmax(dim=1))
    assert accuracy(network, images, logits.argmax(dim=1)) == 1


@EVERY_KIND
def test_saved_classifier_is_loaded_unchanged(tmp_path: Path, kind: str) -> None:
    network, path = KINDS[kind](DIGITS_SHAPE).eval(), tmp_path / "saved.safetensors"
    save_classifier(path, kind, network, FACTS)
    loaded, images = load_classifier(kind, path), bars(20, 0).images
    assert torch.equal(loaded.network(images / 255), network(images / 255))
    assert loaded.accuracy == 0.25 and loaded.facts == FACTS
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "text", "other kind"])
def test_wrong_classifier_file_gives_an_error_of_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "judge.safetensors"
    if damage == "truncated":
        save_classifier(path, "judge", KINDS["judge"](DIGITS_SHAPE), FACTS)
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif damage == "text":
        path.write_text("seven")
    elif damage == "other kind":
        save_classifier(path, "extractor", KINDS["extractor"](DIGITS_SHAPE), FACTS)
    with pytest.raises(ScriptError, match=r"cannot be read|is not a judge") as error:
        load_classifier("judge", path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], ids=str)
def test_classifiers_reject_images_other_than_8_bit_digits(images: Tensor) -> None:
    with pytest.raises(ScriptError, match="needs uint8 images of 1x28x28"):
        recognise(KINDS["judge"](DIGITS_SHAPE).eval(), images)


@pytest.mark.parametrize(
    ("num_digits", "tolerance"),
    [
        (2000, 5e-3),  # two standard deviations
        pytest.param(10_000, 3e-4, marks=pytest.mark.slow),  # kernels of other processors round differently
    ],
)
@pytest.mark.parametrize(("kind", "least"), [("judge", 0.996), ("extractor", 0.99), ("fog_judge", 0.99)])
def test_shipped_classifiers_have_their_stated_accuracy(
    mnist_dir: Path, kind: str, least: float, num_digits: int, tolerance: float
) -> None:
    shipped = load_classifier(kind)
    images, labels = mnist.load_mnist("test", mnist_dir)
    measured = accuracy(shipped.network, images[-num_digits:], labels[-num_digits:])
    assert measured == pytest.approx(shipped.accuracy, abs=tolerance)
    assert shipped.accuracy >= least


@pytest.mark.parametrize(
    "facts",
    [
        '"seven"',
        "7",
        '{"kind": "judge"}',
        '{"kind": "judge", "test_accuracy": NaN}',
        '{"kind": "judge", "test_accuracy": 1' + 400 * "0" + "}",
        '{"kind": "judge", "test_accuracy": 1, "class_names": 5}',
        '{"kind": "judge", "test_accuracy": 1, "class_names": []}',
        '{"kind": "judge", "test_accuracy": 1, "class_names": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}',
        '{"kind": "judge", "test_accuracy": 1, "shape": {"image": [1, 4096, 4096], "num_classes": 10, "width": 32}}',
        '{"kind": "judge", "test_accuracy": 1, "shape": {"image": [1, 28, 28], "num_classes": 1e9, "width": 32}}',
    ],
)
def test_wrong_metadata_gives_an_error_of_one_line(tmp_path: Path, facts: str) -> None:
    path = tmp_path / "judge.safetensors"
    save_file(KINDS["judge"](DIGITS_SHAPE).state_dict(), path, {METADATA_KEY: facts})
    with pytest.raises(ScriptError, match="is not a judge") as error:
        load_classifier("judge", path)
    assert len(str(error.value).splitlines()) == 1


@torch.inference_mode()
@pytest.mark.parametrize("side", [8, 12, 28, 32, 64])
def test_judge_for_colour_accepts_every_image_size_of_a_model(side: int) -> None:
    network = judge_for(Shape((3, side, side), num_classes=12, width=8)).eval()
    images = torch.randint(256, (5, 3, side, side), dtype=torch.uint8)
    assert features_of(network, images).shape == (5, network.num_features)
    assert probabilities_of(network, images).shape == (5, 12)


@torch.inference_mode()
def test_first_layer_of_the_judge_for_colour_whitens_patches_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "NUM_WHITENED", 900)
    network = ColourJudge(Shape((3, 16, 16), width=8)).eval()
    strength = torch.arange(1, 1801).reshape(-1, 1, 1, 1) / 1800  # the first images have little contrast
    noise = strength * torch.rand(1800, 3, 16, 16)
    images = (255 * (0.5 * noise + 0.5 * noise.roll(1, dims=-1)).sqrt()).to(torch.uint8)  # neighbours are correlated
    network.prepare(images)
    outputs = network.whitening(images / 255)  # (N, 2P, H, W)
    ahead, negative = outputs.transpose(0, 1).flatten(1).chunk(2)  # (P, N * positions) each
    torch.testing.assert_close(negative, -ahead)
    torch.testing.assert_close(ahead.mean(dim=1), torch.zeros(12), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(ahead), torch.eye(12), atol=0.02, rtol=0)


@torch.inference_mode()
def test_judge_for_colour_can_learn_from_images_of_one_colour() -> None:
    network = judge_for(Shape((3, 16, 16), width=8)).eval()
    network.prepare(torch.full((20, 3, 16, 16), 100, dtype=torch.uint8))
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


@torch.inference_mode()
@pytest.mark.parametrize("flip", [True, False])
def test_saved_judge_for_colour_reads_shifted_views_and_mirrors_them_if_the_training_did(
    tmp_path: Path, flip: bool
) -> None:
    save_classifier(tmp_path / "judge", "judge", judge_for(Shape((3, 12, 12))), FACTS | {"flip": flip})
    network = load_classifier("judge", tmp_path / "judge").network
    x = torch.rand(8, 3, 12, 12)
    places = [(torch.arange(12) + shift).clamp(0, 11) for shift in (0, 1, -1)]  # pixels at the border are repeated
    views = [x[:, :, place][..., place] for place in places]
    views += [view.flip(-1) for view in views] if flip else []
    assert isinstance(network, ColourJudge)
    expected = torch.stack([network.body(F.gelu(network.whitening(view))) for view in views]).mean(dim=0)
    torch.testing.assert_close(network.features(x), expected)
