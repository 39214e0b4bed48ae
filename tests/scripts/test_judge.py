import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import checkpoint
from model.sampler import Guidance
from scripts import judge, mnist
from scripts.drawing import Drawer, DrawingOptions
from scripts.judge_net import Judge, JudgeError, JudgeNet, accuracy_and_loss, load_judge, recognise, save_judge
from scripts.judge_training import augment, train_judge
from scripts.progress import Reporter
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

Digits = tuple[Tensor, Tensor]


def bars(count: int, seed: int) -> Digits:
    """Ten classes that are easily told apart: a bar whose place is the class, in static."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 40, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[0, 4 + 12 * row : 12 + 12 * row, 4 + 4 * column : 7 + 4 * column] = 255
    return images, labels


def train(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[JudgeNet, dict[str, Any]]:
    monkeypatch.setattr(mnist, "NUM_VALIDATION", 100)
    with Reporter() as reporter:
        return train_judge(bars(740, 1), bars(200, 2), reporter, epochs=5, batch_size=32, seed=seed)


def test_a_judge_learns_and_states_its_accuracy_on_digits_it_never_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    network, facts = train(monkeypatch)
    images, labels = bars(200, 2)
    seen = network(images / 255).argmax(dim=1)
    assert facts["test_accuracy"] == pytest.approx((seen == labels).float().mean().item())
    assert facts["test_accuracy"] > 0.9
    assert facts["num_test"] == 200


def test_a_seed_repeats_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (train(monkeypatch, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_augmentation_moves_the_image_a_little_and_keeps_its_levels() -> None:
    torch.manual_seed(0)
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 11:17, 11:17] = 200
    moved = augment(images)
    assert moved.min() == 0 and moved.max() <= 200 / 255 + 1e-6
    mass = moved.sum(dim=(1, 2, 3))  # (B,)
    place = torch.arange(28.0)
    centre_x = (moved * place).sum(dim=(1, 2, 3)) / mass
    centre_y = (moved * place[:, None]).sum(dim=(1, 2, 3)) / mass
    furthest = torch.hypot(centre_x - 13.5, centre_y - 13.5).max()
    assert 2 < furthest < 2 * 2**0.5 / 0.9 + 0.1  # two pixels each way, over the smallest zoom
    assert min(centre_x.std(), centre_y.std()) > 0.8
    assert mass.std() / mass.mean() > 0.05  # the scale's doing


def test_a_saved_judge_is_the_same_judge(tmp_path: Path) -> None:
    network, path = JudgeNet().eval(), tmp_path / "judge.safetensors"
    save_judge(path, network, {"test_accuracy": 0.25, "epochs": 3})
    loaded = load_judge(path)
    images, labels = bars(20, 0)
    assert torch.equal(loaded.network(images / 255), network(images / 255))
    assert loaded.accuracy == 0.25 and loaded.facts["epochs"] == 3
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert accuracy_and_loss(loaded.network, images, labels) == accuracy_and_loss(network, images, labels)


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "text"])
def test_a_file_without_a_judge_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "judge.safetensors"
    if kind == "truncated":
        save_judge(path, JudgeNet(), {"test_accuracy": 1.0})
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif kind == "text":
        path.write_text("seven")
    with pytest.raises(JudgeError) as error:
        load_judge(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], ids=str)
def test_the_judge_sees_8_bit_digits_only(images: Tensor) -> None:
    with pytest.raises(JudgeError):
        recognise(JudgeNet().eval(), images)


def test_the_shipped_judge_is_as_good_as_it_says(mnist_dir: Path) -> None:
    shipped = load_judge()
    images, labels = mnist.load_mnist("test", mnist_dir)
    accuracy, _ = accuracy_and_loss(shipped.network, images, labels)
    assert accuracy == pytest.approx(shipped.accuracy, abs=3e-4)  # other kernels round otherwise
    assert accuracy >= 0.99


def test_a_score_counts_by_digit_and_names_the_worst() -> None:
    asked = torch.arange(40) % 10
    seen = asked.clone()
    seen[[4, 14]] = 9
    seen[7] = 1
    result = judge.score(asked, seen)
    assert result.num_images == 40
    assert result.recognised == pytest.approx(37 / 40)
    assert result.per_digit == pytest.approx((1, 1, 1, 1, 0.5, 1, 1, 0.75, 1, 1))
    assert result.worst_digit == 4
    assert list(result.mistakes.items()) == [("4 as 9", 2), ("7 as 1", 1)]


class Witness(JudgeNet):
    """Keeps what it is shown; sees the digits 0 to 9 in turn but for the first, which it takes for a 3."""

    def forward(self, x: Tensor) -> Tensor:
        self.shown = x
        seen = torch.arange(len(x)) % 10
        seen[0] = 3
        return torch.nn.functional.one_hot(seen, 10).float()


def test_digits_are_judged_in_8_bits_as_many_of_each(tmp_path: Path) -> None:
    drawer = Drawer(checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")))
    witness = Witness()
    options = DrawingOptions("ddim", 2, Guidance())
    with Reporter() as reporter:
        result = judge.score_drawer(
            drawer, options, Judge(witness, {}, ""), reporter, num_images=30, seed=1, batch_size=7
        )
    assert torch.equal(witness.shown * 255, (witness.shown * 255).round())
    assert witness.shown.std() > 0.1  # it was shown pictures
    assert result.mistakes == {"0 as 3": 1}
    assert result.per_digit == pytest.approx((2 / 3, *[1.0] * 9))


@pytest.fixture
def judge_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_judge(tmp_path / "judge.safetensors", JudgeNet(), {"test_accuracy": 0.125, "num_test": 80})
    return tmp_path / "judge.safetensors"


def test_score_prints_and_writes_the_same_figures(
    tmp_path: Path, judge_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    arguments = ["--num-images", "40", "--num-steps", "2", "--guidance-scale", "2", "--guidance-stop", "7"]
    judge.main(
        ["score", "--checkpoint", str(tiny), "--judge", str(judge_file), "--out", str(tmp_path / "a.json"), *arguments]
    )
    written = json.loads((tmp_path / "a.json").read_text())
    printed = capsys.readouterr().out
    assert f"{written['recognised']:.2%} of 40" in printed
    assert "12.50% of 80 real test digits" in printed
    assert written["num_images"] == 40
    assert sum(written["per_digit"]) / 10 == pytest.approx(written["recognised"])
    assert sum(written["mistakes"].values()) == round(40 * (1 - written["recognised"]))
    guidance = {"scale": 2.0, "start": 2, "stop": 7}
    assert written["options"] == {"sampler": "ddpm", "num_steps": 2, "guidance": guidance}
    assert written["checkpoint_sha256"] == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert written["judge"]["sha256"] == hashlib.sha256(judge_file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["judge"],
        ["score", "--num-images", "15"],
        ["score", "--num-images", "0"],
        ["score", "--checkpoint", "nowhere.safetensors"],
        ["score", "--judge", "nowhere.safetensors"],
        ["train", "--epochs", "many"],
    ],
    ids=lambda wrong: " ".join(wrong) or "nothing",
)
def test_a_wrong_argument_is_one_sentence_and_status_2(capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        judge.main(wrong)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
