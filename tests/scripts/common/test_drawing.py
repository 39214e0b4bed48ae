import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.clip import Clip
from model.clip_guidance import START, STOP
from model.compiled.compiler import CompilerError
from model.compiled.private_cache import default_cache
from model.pixels import to_pixels
from model.sampler import Guidance, sample
from model.schedule import ScheduleConfig
from model.step import ReverseStep, Step, Stepped
from scripts.common import drawing
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, options_from
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.scripts.tiny_checkpoint import NUM_STEPS, save_tiny_checkpoint
from tests.tiny import COMPILED, tiny_unet

GUIDANCE = Guidance(1.5, start=2, stop=8)


def request(**given: Any) -> DrawingRequest:
    return DrawingRequest(**{"sampler": "ddpm", **given})


@pytest.mark.parametrize("fast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_batches_equal_the_unbatched_reverse_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: Any, fast: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": fast})
    path = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    y, index = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 1, 2, 3, 9])
    options = DrawingOptions(sampler, 4, GUIDANCE)
    with Reporter() as reporter:
        drawn = Drawer(checkpoint.load(path)).draw(y, index, options, reporter, seed=6, batch_size=2)
    loaded = checkpoint.load(path)
    expected = sample(
        loaded.network,
        loaded.schedule,
        y,
        seed=torch.full_like(y, 6),
        index=index,
        image_shape=(1, 28, 28),
        sampler=sampler,
        num_steps=4,
        null_label=10,
        guidance=GUIDANCE,
    )
    error = (drawn - expected).abs().mean()
    assert error < (0.05 if fast else 1e-4)
    # The limit must detect rows in a wrong order, both in float32 and in bfloat16.
    assert (drawn - expected.flip(0)).abs().mean() > 0.2


def test_guidance_leads_away_from_no_class_for_any_number_of_classes(tmp_path: Path) -> None:
    """Label 10 means "no class" only in a network with ten classes."""
    network, names = tiny_unet(image_size=28, num_classes=12, widths=(8, 8)), tuple("abcdefghijkl")
    training, path = {"label_drop": 0.1}, tmp_path / "twelve.safetensors"
    config = CheckpointConfig(network.config, ScheduleConfig(), class_names=names, training=training)
    checkpoint.save(path, network, config)
    loaded, y, guidance = checkpoint.load(path), torch.tensor([3, 10, 11]), Guidance(3.0)
    with Reporter() as reporter:
        drawn = Drawer(loaded).draw(y, y, DrawingOptions("ddim", 4, guidance), reporter, seed=6)
    exact = checkpoint.load(path).network  # the drawer may have converted the other one to bfloat16
    of_null_label = {
        label: sample(
            exact,
            loaded.schedule,
            y,
            seed=torch.full_like(y, 6),
            index=y,
            image_shape=loaded.image_shape,
            sampler="ddim",
            num_steps=4,
            null_label=label,
            guidance=guidance,
        )
        for label in (10, 12)
    }
    assert (drawn - of_null_label[12]).abs().mean() < 0.1 * (drawn - of_null_label[10]).abs().mean()


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled_step_gives_nearly_the_same_images(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, **COMPILED)
    y, options, images = torch.arange(9), DrawingOptions("ddim", 2, Guidance(1.5, start=20, stop=80)), []
    with Reporter() as reporter:
        for mode in ("off", "on"):
            drawer = Drawer(checkpoint.load(path))
            drawer.compile(mode, reporter)
            assert drawer.facts["compiled"] == (mode == "on")
            images.append(drawer.draw(y, y, options, reporter, seed=6, batch_size=4))
    plain, compiled = images
    assert (plain - compiled).abs().mean() < 0.02
    assert (plain - compiled.flip(0)).abs().mean() > 0.2


@pytest.fixture
def drawer(tmp_path: Path) -> Drawer:
    return Drawer(checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")))


def compile_with(drawer: Drawer, mode: str) -> None:
    with Reporter() as reporter:
        drawer.compile(mode, reporter)


def cannot_compile(program: ReverseStep, cache: Path) -> Step:
    raise CompilerError("compiling needs a C++ compiler")


def test_auto_falls_back_to_the_uncompiled_step_and_reports_the_reason(
    drawer: Drawer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "compiled_step", cannot_compile)
    compile_with(drawer, "auto")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "not compiled, so generating images is slower: compiling needs a C++ compiler"
    assert not drawer.facts["compiled"]
    y = torch.arange(2)
    with Reporter() as reporter:
        drawn = drawer.draw(y, y, DrawingOptions("ddim", 2, GUIDANCE), reporter, seed=6)
    assert drawn.shape == (2, 1, 28, 28)


def test_compile_on_fails_with_one_line_if_compilation_fails(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "compiled_step", cannot_compile)
    with pytest.raises(ScriptError, match=r"^--compile on: compiling needs a C\+\+ compiler$"):
        compile_with(drawer, "on")
    assert not drawer.facts["compiled"]


@pytest.mark.parametrize(("mode", "device"), [("off", "cpu"), ("off", "cuda"), ("auto", "cuda")])
def test_compile_off_and_auto_on_a_gpu_never_compile(
    drawer: Drawer, monkeypatch: pytest.MonkeyPatch, mode: str, device: str
) -> None:
    monkeypatch.setattr(drawing, "compiled_step", lambda *_: pytest.fail("compiled"))
    drawer.device = torch.device(device)
    compile_with(drawer, mode)
    assert not drawer.facts["compiled"]


def test_compiler_error_at_the_first_call_is_reported_in_one_line(
    drawer: Drawer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, compilation starts with the first step."""

    def step(*inputs: torch.Tensor) -> Stepped:
        raise CompilerError("compiling failed: no C compiler")

    monkeypatch.setattr(drawing, "compiled_step", lambda program, cache: step)
    compile_with(drawer, "on")
    y = torch.arange(2)
    with Reporter() as reporter, pytest.raises(ScriptError, match=r"^--compile on: compiling failed: no C compiler$"):
        drawer.draw(y, y, DrawingOptions("ddim", 2, GUIDANCE), reporter, seed=6)


def test_compiler_log_is_shown_only_during_compilation(
    drawer: Drawer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("model.compiled.compiler")
    before = log.getEffectiveLevel()

    def compile_and_log(program: ReverseStep, cache: Path) -> Step:
        log.info("compiling for %s", "this machine")
        log.warning("the cache cannot be used", extra={"reason": "read-only"})
        return program

    monkeypatch.setattr(drawing, "compiled_step", compile_and_log)
    compile_with(drawer, "auto")
    lines = ["compiling for this machine", "the cache cannot be used reason=read-only"]
    assert capsys.readouterr().out.splitlines() == lines
    log.error("later")
    assert capsys.readouterr().out == ""
    assert log.getEffectiveLevel() == before


def test_compiled_steps_use_the_cache_folder_of_the_service(
    drawer: Drawer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Path] = []

    def compile_to(program: ReverseStep, cache: Path) -> Step:
        caches.append(cache)
        return program

    monkeypatch.setattr(drawing, "compiled_step", compile_to)
    for folder in (str(tmp_path / "own"), ""):  # an empty variable counts as unset, as in the service
        monkeypatch.setenv("UNFOG_CACHE_DIR", folder)
        compile_with(drawer, "auto")
    assert caches == [tmp_path / "own", default_cache()]


def test_options_default_to_the_values_of_the_checkpoint(tmp_path: Path) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    assert options_from(request(), loaded) == DrawingOptions("ddpm", NUM_STEPS, GUIDANCE)
    asked = request(num_steps=3, sampler="ddim", guidance_scale=2.0, guidance_start=1, guidance_stop=5)
    assert options_from(asked, loaded) == DrawingOptions("ddim", 3, Guidance(2.0, 1, 5))


def test_guidance_defaults_to_the_guidance_of_the_sampler(tmp_path: Path) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    config = dataclasses.replace(loaded.config, guidance_by_sampler={"dpmpp": Guidance(3.0, 4, 6)})
    loaded = dataclasses.replace(loaded, config=config)
    assert options_from(request(), loaded).guidance == GUIDANCE
    assert options_from(request(sampler="dpmpp"), loaded).guidance == Guidance(3.0, 4, 6)
    assert options_from(request(sampler="dpmpp", guidance_scale=2.0), loaded).guidance == Guidance(2.0, 4, 6)


def test_guidance_is_rejected_without_label_dropout(tmp_path: Path) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "b.safetensors", label_drop=0, guidance=Guidance()))
    assert options_from(request(), loaded).guidance.scale == 1
    assert options_from(request(guidance_scale=1.0), loaded).guidance.scale == 1
    with pytest.raises(ScriptError, match="does not support guidance"):
        options_from(request(guidance_scale=1.5), loaded)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 11},
        {"guidance_start": 9},
        {"guidance_stop": 11},
        {"guidance_stop": 1},
        {"guidance_scale": 1, "guidance_stop": 5},
    ],
    ids=str,
)
def test_unsupported_or_ineffective_options_are_rejected(tmp_path: Path, wrong: dict[str, int]) -> None:
    loaded = checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors"))
    with pytest.raises(ScriptError, match=r"too large|--guidance-start must not|guidance is off"):
        options_from(request(**wrong), loaded)


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 100 timesteps. The default interval of CLIP guidance is made for this number."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny.safetensors", num_steps=100)


def draw_with_clip(path: Path, y: Tensor, batch_size: int = 64, **given: Any) -> Tensor:
    """Returns the pixels of images with 4 steps, of which those at t = 50 and t = 25 have CLIP guidance."""
    loaded = checkpoint.load(path)
    options = options_from(request(num_steps=4, **given), loaded)
    index = torch.arange(len(y))
    with Reporter() as reporter:
        return to_pixels(Drawer(loaded).draw(y, index, options, reporter, seed=6, batch_size=batch_size))


def test_image_with_clip_guidance_has_the_same_pixels_for_every_batch_size(long_checkpoint: Path) -> None:
    pytest.importorskip("open_clip")
    y = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    one, three, all_ = (draw_with_clip(long_checkpoint, y, size, clip_guidance_scale=2.0) for size in (1, 3, 64))
    assert torch.equal(one, all_)
    assert torch.equal(three, all_)
    assert not torch.equal(all_, draw_with_clip(long_checkpoint, y))


def test_default_prompt_names_the_digit_of_the_image(long_checkpoint: Path) -> None:
    pytest.importorskip("open_clip")
    y = torch.tensor([7, 2, 7])
    both = draw_with_clip(long_checkpoint, y, clip_guidance_scale=5.0)
    of_prompt = {
        word: draw_with_clip(long_checkpoint, y, clip_guidance_scale=5.0, clip_prompt=f"a handwritten digit {word}")
        for word in ("seven", "two")
    }
    assert torch.equal(both[[0, 2]], of_prompt["seven"][[0, 2]])
    assert torch.equal(both[1], of_prompt["two"][1])
    assert not torch.equal(both[1], of_prompt["seven"][1])


def test_options_without_clip_guidance_have_no_field_about_it(long_checkpoint: Path) -> None:
    pytest.importorskip("open_clip")
    loaded = checkpoint.load(long_checkpoint)
    assert set(options_from(request(), loaded).facts) == {"sampler", "num_steps", "guidance"}
    assert options_from(request(clip_guidance_scale=1.5, clip_prompt="a seven"), loaded).facts["clip"] == {
        "guidance": {"scale": 1.5, "start": START, "stop": STOP},
        "prompt": "a seven",
        "model": "embedded",
        "sha256": Clip().sha256,
    }


@pytest.mark.parametrize("given", [{"clip_prompt": "a seven"}, {"clip_model": "embedded"}], ids=str)
def test_clip_option_without_a_scale_is_rejected(long_checkpoint: Path, given: dict[str, str]) -> None:
    option = f"--{next(iter(given))}".replace("_", "-")
    with pytest.raises(ScriptError, match=f"^{option} needs a --clip-guidance-scale above 0"):
        options_from(request(**given), checkpoint.load(long_checkpoint))


def test_missing_open_clip_is_reported_with_the_command_that_installs_it(
    long_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    drawing.load_clip.cache_clear()
    with pytest.raises(ScriptError, match=r"pip install -e '\.\[clip\]'$"):
        options_from(request(clip_guidance_scale=1.0), checkpoint.load(long_checkpoint))
