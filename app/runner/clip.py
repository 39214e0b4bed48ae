"""The CLIP model of the service. It compares images with prompts, and guides the denoising steps.

The model for guidance is in this process, on the device of the runner. Embeddings of prompts and of images are computed
in a child process on the CPU, so that they do not delay the steps (see clip_process.py).
"""

from collections.abc import Sequence

import torch

from app.engine.interface import ClipInfo, Embeddings, RunnerError
from app.engine.job import Pixels
from app.runner.clip_process import ClipProcess, embed
from model import clip
from model.clip import Clip, ClipError, name_without_folders


class ClipModel:
    """A CLIP model on the device of the runner, and the child process for embeddings."""

    def __init__(self, model: Clip, prompts: Sequence[str] = (), process: ClipProcess | None = None) -> None:
        """Embeds `prompts` immediately. Pass the default prompts, so that no request waits for them.

        They are embedded in this process on the CPU, like all other prompts, because a GPU rounds differently.
        """
        self.clip, self.info = model, ClipInfo(name_without_folders(model.name), model.sha256)
        self.process = process or ClipProcess()
        self.process.name, self.process.sha256 = model.name, model.sha256
        on_cpu = model if model.device.type == "cpu" else Clip(model.name)
        self.known = {prompt: embed(on_cpu, [prompt])[0] for prompt in prompts}

    @classmethod
    def load(cls, setting: str, device: torch.device, prompts: Sequence[str] = ()) -> "ClipModel | None":
        """Returns the model that UNFOG_CLIP names, or None. Raises RunnerError if it cannot be loaded.

        Starts the child process too. `wait_until_ready` waits for it. The weights must not be inference tensors,
        because guidance needs the gradient with respect to the image.
        """
        if setting == "off" or (setting == "auto" and not clip.is_installed()):
            return None
        process = ClipProcess()
        process.start()
        try:
            return cls(Clip(clip.EMBEDDED_NAME if setting == "auto" else setting, device), prompts, process)
        except ClipError as error:
            process.close()
            raise RunnerError(
                f"UNFOG_CLIP: {str(error).rstrip('.')}. auto loads the shipped model, off loads none"
            ) from error

    def wait_until_ready(self) -> None:
        """Waits until the child process has loaded its model. Raises RunnerError if this fails."""
        try:
            self.process.wait_until_ready()
        except RuntimeError as error:
            raise RunnerError(f"UNFOG_CLIP: {error}") from error

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Returns the embeddings (P, E) of the prompts."""
        return self.process.call(prompts)

    def embed_images(self, images: Sequence[Pixels]) -> Embeddings:
        """Returns the embeddings (N, E) of grey images (H, W) or colour images (H, W, C) of one size."""
        return self.process.call(images)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Returns the words of the prompts that the model has not learned."""
        return self.clip.unknown_words(prompts)

    def close(self) -> None:
        """Ends the child process. A call that is in progress raises RuntimeError."""
        self.process.close()
