import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from app.engine.interface import RunnerError
from app.runner.clip import ClipModel
from app.runner.clip_process import ClipProcess
from app.runner.load import load_runner
from app.settings import Settings
from model.clip import EMBEDDED, Clip
from model.prompts import digit_prompt
from tests.app.runner.rows import CPU

PROMPTS = ["a handwritten digit seven", "a cat"]


@pytest.fixture(scope="module")
def embedded() -> Iterator[ClipModel]:
    loaded = ClipModel.load("auto", CPU, PROMPTS)
    assert loaded
    yield loaded
    loaded.close()


def test_auto_loads_the_embedded_model_if_open_clip_is_installed(embedded: ClipModel) -> None:
    assert (embedded.info.name, len(embedded.info.sha256)) == ("embedded", 64)


def test_auto_loads_no_model_if_open_clip_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.clip.is_installed", lambda: False)
    assert ClipModel.load("auto", CPU) is None


def test_off_does_not_load_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.runner.clip.Clip", None)
    assert ClipModel.load("off", CPU) is None


def test_name_of_a_model_in_a_folder_does_not_contain_the_path(tmp_path: Path, embedded: ClipModel) -> None:
    folder = tmp_path / "mine"
    folder.symlink_to(EMBEDDED)
    loaded = ClipModel.load(str(folder), CPU)
    assert loaded
    loaded.close()
    assert (loaded.info.name, loaded.info.sha256) == ("mine", embedded.info.sha256)


def test_model_that_cannot_be_loaded_ends_the_start_with_one_line_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"^UNFOG_CLIP: Cannot load CLIP model .*nothing.*") as caught:
        ClipModel.load(str(tmp_path / "nothing"), CPU)
    assert "\n" not in str(caught.value)


def test_named_model_without_open_clip_ends_the_start_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RunnerError, match=r"UNFOG_CLIP: .*pip install -e '\.\[clip\]'"):
        ClipModel.load(str(EMBEDDED), CPU)


def test_embeddings_equal_those_of_open_clip(embedded: ClipModel) -> None:
    """The images go through open_clip's own transform here, which reads them with Pillow."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{EMBEDDED}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{EMBEDDED}")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    with torch.inference_mode():
        x = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])
        of_images = model.eval().encode_image(x, normalize=True).numpy()
        of_prompts = model.encode_text(tokenizer(PROMPTS), normalize=True).numpy()
    np.testing.assert_allclose(embedded.embed_images(list(images)), of_images, atol=1e-5)
    np.testing.assert_allclose(embedded.embed_prompts(PROMPTS), of_prompts, atol=1e-5)


def test_colour_image_with_equal_channels_has_the_embedding_of_the_grey_image(embedded: ClipModel) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (28, 28), np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_allclose(embedded.embed_images([colour]), embedded.embed_images([grey]), atol=1e-6)


def test_similarity_is_differentiable_after_loading_in_any_thread(embedded: ClipModel) -> None:
    x = torch.zeros(1, 1, 28, 28, requires_grad=True)
    embedded.clip.embed_images(x)[0, 0].backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_runner_loads_the_model_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(setting: str, device: torch.device, prompts: list[str]) -> None:
        asked.append((setting, device.type, prompts))

    monkeypatch.setattr(ClipModel, "load", load)
    assert load_runner(Settings(device="cpu", compile="off", clip="a:b")).clip is None
    assert asked == [("a:b", "cpu", [digit_prompt(digit) for digit in range(10)])]


def test_child_process_is_ready_when_the_runner_is_loaded() -> None:
    """Otherwise its start would take CPU time from the warm-up and from the first steps."""
    runner = load_runner(Settings(device="cpu", compile="off", clip="auto"))
    assert runner.clip
    (policy,) = {
        os.sched_getscheduler(int(path.name)) for path in Path(f"/proc/{runner.clip.process.pid}/task").iterdir()
    }
    runner.clip.close()
    assert policy == os.SCHED_IDLE  # the policy after loading


def test_child_process_that_ends_while_it_loads_ends_the_start_with_one_line_that_names_the_setting() -> None:
    loaded = ClipModel(Clip())
    loaded.process = ClipProcess("embedded", "0" * 64)  # ends because the digest differs
    with pytest.raises(RunnerError, match=r"^UNFOG_CLIP: the CLIP process has ended$"):
        loaded.wait_until_ready()


def test_weights_are_not_inference_tensors(embedded: ClipModel) -> None:
    assert not any(weight.is_inference() for weight in embedded.clip.model.parameters())
    assert isinstance(embedded.clip, Clip)
    assert embedded.embed_prompts([digit_prompt(0)]).shape == (1, 64)


def test_known_prompts_have_the_bits_of_the_child_process(embedded: ClipModel) -> None:
    """An embedding must not depend on whether a prompt was embedded at the start."""
    for prompt in PROMPTS:
        assert np.array_equal(embedded.known[prompt], embedded.embed_prompts([prompt])[0])


def test_known_prompts_are_embedded_on_the_cpu_if_guidance_is_on_a_gpu(embedded: ClipModel) -> None:
    on_gpu = Clip()
    on_gpu.device = torch.device("cuda")  # without a GPU, only the attribute differs
    assert np.array_equal(ClipModel(on_gpu, PROMPTS).known[PROMPTS[0]], embedded.known[PROMPTS[0]])
