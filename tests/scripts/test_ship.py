import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import CheckpointConfig, Probe, draw_probe, load, save
from model.schedule import ScheduleConfig
from model.spec import Guidance
from scripts import ship
from scripts.training.recipe import load_recipe
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny import tiny_unet


def evaluation_of(
    path: Path, *, sampler: str = "ddpm", guidance: Guidance = Guidance(), **facts: Any
) -> dict[str, Any]:
    """Returns an evaluation of the weights in this file, in the format of scripts.evaluate."""
    seen = {"accuracy": 0.5, "per_class": [0.5] * 10}
    manifold = {"precision": 0.5, "recall": 0.5, "coverage": 0.5}
    return {
        "weights_sha256": load(path).weights_sha256,
        "options": {"sampler": sampler, "num_steps": 2, "guidance": asdict(guidance)},
        "num_images": 100,
        "split": "test",
        "networks": {},
        "noise_frechet": 9.0,
        "frechet_ratio": 2.0,
        **dict.fromkeys(("judge", "real_judge", "extractor"), seen),
        **dict.fromkeys(("manifold", "real_manifold"), manifold),
        **dict.fromkeys(("frechet", "real_frechet", "memorised", "held_out_memorised"), 0.5),
        **facts,
    }


def error_of_shipping(source: Path, content: Any, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs scripts.ship with a wrong evaluation and returns its error message."""
    file, target = source.parent / "evaluation.json", source.parent / "out.safetensors"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        ship.main([str(source), f"--out={target}", f"--evaluation={file}", *arguments])
    assert ended.value.code == 2
    assert not target.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_shipped_checkpoint_has_float16_weights_guidance_and_evaluations(tmp_path: Path) -> None:
    run = save_tiny_checkpoint(tmp_path / "run.safetensors", num_steps=100)  # the guidance of the preset begins late
    target = tmp_path / "weights" / "default.safetensors"
    source, recipe = tmp_path / "shipped.safetensors", load_recipe("default")
    ship.main([str(run), f"--out={source}"])
    guided = evaluation_of(source, guidance=recipe.guidance_by_sampler["ddpm"])
    off = evaluation_of(source, guidance=Guidance())
    for path, content in ((tmp_path / "guided.json", guided), (tmp_path / "off.json", off)):
        path.write_text(json.dumps(content))
    evaluations = ["--evaluation", str(tmp_path / "guided.json"), str(tmp_path / "off.json")]
    ship.main([str(source), "--guidance-of=default", f"--out={target}", *evaluations])
    before, after = load(run), load(target)
    assert (after.config.guidance, after.config.guidance_by_sampler) == (recipe.guidance, recipe.guidance_by_sampler)
    assert before.config.guidance != after.config.guidance
    assert after.config.training == {**before.config.training, "evaluation": [guided, off]}
    assert after.weights_sha256 == guided["weights_sha256"]
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor.half().float(), after.network.state_dict()[name])
    assert target.stat().st_size < 0.7 * run.stat().st_size
    drawn = draw_probe(after.network, after.config)
    assert (drawn - after.probe_image).abs().max() <= 1 / 255 + 1e-6


def test_evaluation_of_the_float32_weights_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny_checkpoint(tmp_path / "run.safetensors")
    assert "not an evaluation of these weights" in error_of_shipping(source, evaluation_of(source), capsys=capsys)


@pytest.mark.parametrize("wrong", [{"weights_sha256": "0" * 64}, {"options": None}])
def test_evaluation_of_other_weights_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    source = tmp_path / "shipped.safetensors"
    ship.main([str(save_tiny_checkpoint(tmp_path / "run.safetensors")), f"--out={source}"])
    content = {name: value for name, value in evaluation_of(source, **wrong).items() if value is not None}
    assert "not an evaluation of these weights" in error_of_shipping(source, content, capsys=capsys)


def test_evaluation_with_another_guidance_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "shipped.safetensors"
    ship.main([str(save_tiny_checkpoint(tmp_path / "run.safetensors", num_steps=100)), f"--out={source}"])
    content = evaluation_of(source, guidance=load(source).config.guidance)
    assert "was evaluated with guidance" in error_of_shipping(source, content, "--guidance-of=default", capsys=capsys)


@pytest.mark.parametrize("content", [[1, 2], {"scores": {}}, "no evaluation"])
def test_json_that_is_not_an_evaluation_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object
) -> None:
    source = save_tiny_checkpoint(tmp_path / "run.safetensors")
    assert "is not an evaluation" in error_of_shipping(source, content, capsys=capsys)


def test_student_and_default_share_the_size_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SHIPPED", "SHIPPED_FAST"):
        monkeypatch.setattr(ship, name, tmp_path / "weights" / getattr(ship, name).name)
    plain, student = save_tiny_checkpoint(tmp_path / "run.safetensors"), tmp_path / "student.safetensors"
    loaded = load(plain)
    config = replace(loaded.config, steps=(2,), samplers=("ddim",), guidance=Guidance(), probe=Probe(num_steps=2))
    save(student, loaded.network, config)
    for source in (plain, student):
        ship.main([str(source)])
    default, fast = (tmp_path / "weights" / f"{name}.safetensors" for name in ("default", "fast"))
    assert (load(default).config.steps, load(fast).config.steps) == ((), (2,))
    monkeypatch.setattr(ship, "MAX_BYTES", default.stat().st_size + 1000)
    with pytest.raises(SystemExit):
        ship.main([str(student)])
    assert "would have more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.safetensors"], "No such file"),
        (["{source}", "--guidance-of", "missing"], "missing"),
        (["{source}", "--evaluation", "missing.json"], "cannot be read"),
    ],
)
def test_wrong_argument_exits_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    source, target = save_tiny_checkpoint(tmp_path / "run.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        ship.main([argument.format(source=source) for argument in arguments] + [f"--out={target}"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert len(message.splitlines()) == 1
    assert not target.exists()


def test_too_large_checkpoint_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_checkpoint(tmp_path / "run.safetensors")
    monkeypatch.setattr(ship, "MAX_BYTES", 2 * sum(p.numel() for p in load(source).network.parameters()) - 1)
    with pytest.raises(SystemExit):
        ship.main([str(source), f"--out={tmp_path / 'out.safetensors'}"])
    assert "more than" in capsys.readouterr().err


def test_normalisation_of_handwriting_is_stored_and_refused_for_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save_tiny_checkpoint(tmp_path / "tiny.safetensors"), tmp_path / "out.safetensors"
    ship.main([str(source), f"--out={out}", "--normalisation=none"])
    assert load(out).config.normalisation == "none"
    network = tiny_unet(image_size=12)
    save(source, network, CheckpointConfig(network.config, ScheduleConfig()))
    with pytest.raises(SystemExit):
        ship.main([str(source), f"--out={out}", "--normalisation=mnist"])
    assert "normalisation can be mnist only for grey images of 28x28 pixels" in capsys.readouterr().err
