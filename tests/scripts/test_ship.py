import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import Probe, draw_probe, load, save
from model.sampler import Guidance
from scripts import ship
from scripts.recipe import load_recipe
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


def test_what_ships_has_the_weights_in_half_the_bytes_the_guidance_and_the_evaluation(tmp_path: Path) -> None:
    run, target = save_tiny_checkpoint(tmp_path / "run.safetensors"), tmp_path / "weights" / "default.safetensors"
    source = tmp_path / "shipped.safetensors"
    ship.main([str(run), f"--out={source}"])
    evaluations = [tmp_path / "guided.json", tmp_path / "off.json"]
    for path, share in zip(evaluations, (0.5, 0.25), strict=True):
        path.write_text(json.dumps({"recognised": share, "checkpoint_sha256": load(source).sha256}))
    ship.main(
        [
            str(source),
            "--guidance-of=default",
            f"--out={target}",
            "--evaluation",
            *map(str, evaluations),
        ]
    )
    before, after = load(run), load(target)
    recipe = load_recipe("default")
    assert (after.config.guidance, after.config.guidance_by_sampler) == (recipe.guidance, recipe.guidance_by_sampler)
    assert before.config.guidance != after.config.guidance
    assert after.config.training == {
        **before.config.training,
        "evaluation": [{"recognised": 0.5}, {"recognised": 0.25}],
    }
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(tensor.half().float(), after.network.state_dict()[name])
    assert target.stat().st_size < 0.7 * run.stat().st_size
    drawn = draw_probe(after.network, after.config)
    assert (drawn - after.probe_image).abs().max() <= 1 / 255 + 1e-6


def test_the_evaluation_of_weights_that_shipping_rounds_does_not_ship(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = save_tiny_checkpoint(tmp_path / "run.safetensors"), tmp_path / "out.safetensors"
    (tmp_path / "its own.json").write_text(json.dumps({"checkpoint_sha256": load(source).sha256}))
    with pytest.raises(SystemExit):
        ship.main([str(source), f"--out={target}", f"--evaluation={tmp_path}/its own.json"])
    assert "rounds these weights" in capsys.readouterr().err
    assert not target.exists()


def test_the_evaluation_of_another_checkpoint_does_not_ship(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = save_tiny_checkpoint(tmp_path / "run.safetensors"), tmp_path / "out.safetensors"
    for content in ({"checkpoint_sha256": "0" * 64}, {"recognised": 0.5}):
        (tmp_path / "of another.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            ship.main([str(source), f"--out={target}", f"--evaluation={tmp_path}/of another.json"])
        assert "not an evaluation of this checkpoint" in capsys.readouterr().err
    assert not target.exists()


def test_a_student_ships_beside_the_default_model_and_both_together_stay_small(
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
    assert "would ship" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.safetensors"], "No such file"),
        (["{source}", "--guidance-of", "missing"], "missing"),
        (["{source}", "--evaluation", "missing.json"], "No such file"),
    ],
)
def test_what_cannot_ship_is_one_sentence_and_status_2(
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


def test_a_checkpoint_that_is_too_large_does_not_ship(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_checkpoint(tmp_path / "run.safetensors")
    monkeypatch.setattr(ship, "MAX_BYTES", 2 * sum(p.numel() for p in load(source).network.parameters()) - 1)
    with pytest.raises(SystemExit):
        ship.main([str(source), f"--out={tmp_path / 'out.safetensors'}"])
    assert "more than" in capsys.readouterr().err
