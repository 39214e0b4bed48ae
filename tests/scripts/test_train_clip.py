import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import train_clip as script
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import load_clip
from scripts.common.mnist import DATA_OF_FEATURES, TRAINING_DATA, load_mnist, split_unlearned, split_validation
from scripts.common.progress import Reporter
from scripts.evaluation import clip_training
from scripts.evaluation.captions import CAPTIONS
from scripts.evaluation.classifiers import CLIP_FOR_FEATURES
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.clip_training import MODEL, save_clip, train_clip
from scripts.evaluation.spaces import space_of_clip
from tests.scripts.evaluation.bars import bars
from tests.scripts.tiny_training import trust_idx_files, write_idx_files

open_clip = pytest.importorskip("open_clip")


TOKENS = open_clip.SimpleTokenizer(context_length=24)(CAPTIONS)


def trained_clip(epochs: int, seed: int = 0, num_images: int = 640) -> torch.nn.Module:
    torch.manual_seed(seed)
    model: torch.nn.Module = open_clip.CLIP(**MODEL)
    with Reporter() as reporter:
        train_clip(model, TOKENS, bars(num_images, 1), reporter, epochs=epochs, batch_size=32, seed=seed)
    return model


def test_trained_clip_matches_captions_and_is_loaded_by_open_clip(tmp_path: Path) -> None:
    save_clip(tmp_path, trained_clip(5), TOKENS, {"epochs": 5})
    digits = bars(200, 2)
    static = torch.randint(0, 256, digits.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scorer = ClipScorer(str(tmp_path))
    assert scorer.score(digits).clear > 0.9 > 0.1 > scorer.score(ImageSet(static, digits.labels)).clear
    words = load_file(tmp_path / "open_clip_model.safetensors")["token_embedding.weight"]
    known = words.any(dim=1).nonzero()[:, 0]
    assert torch.equal(known, TOKENS.unique())


def test_same_seed_gives_the_same_weights() -> None:
    first, again, other = (trained_clip(1, seed, num_images=64).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.conv1.weight"], other["visual.conv1.weight"])


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--data-dir", "nowhere"], ["--out", "my:clip"]])
def test_wrong_argument_exits_with_status_2_and_one_line(
    wrong: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *args, **options: (_ for _ in ()).throw(OSError("none")))
    with pytest.raises(SystemExit) as exit_:
        script.main(wrong)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("for_features", [False, True])
def test_model_for_features_does_not_learn_the_digits_of_distances(
    for_features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx_files(tmp_path / "data", num_images=200)
    trust_idx_files(monkeypatch, 200)
    learned: list[ImageSet] = []
    monkeypatch.setattr(
        clip_training, "train_clip", lambda model, tokens, learn, *args, **options: learned.append(learn)
    )
    more = ["--for-features"] if for_features else []
    script.main([f"--data-dir={tmp_path / 'data'}", f"--out={tmp_path / 'clip'}", "--epochs=1", *more])
    everything, _ = split_validation(*load_mnist("train", tmp_path / "data"))
    expected = split_unlearned(*everything)[0] if for_features else everything
    assert torch.equal(learned[0].images, expected[0])
    facts = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())["training"]
    assert facts["data"] == (DATA_OF_FEATURES if for_features else TRAINING_DATA)
    assert (tmp_path / "clip" / "digits.png").exists() != for_features


def test_model_of_the_distances_is_one_for_features() -> None:
    facts = json.loads((CLIP_FOR_FEATURES / "open_clip_config.json").read_text())["training"]
    assert facts["data"] == DATA_OF_FEATURES
    assert space_of_clip().sha256 == load_clip(str(CLIP_FOR_FEATURES)).sha256 != load_clip().sha256
