"""CLIP scores (Radford 2021): similarity of pictures and prompts, by any model that open_clip loads.

Compare a score only with that of real digits: OpenAI's ViT-B/32 recognises only about half of the real digits.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model.clip import EMBEDDED_NAME
from model.diffusion import Diffusion
from model.pixels import from_pixels, to_pixels
from model.prompts import digit_prompt
from model.schedule import Schedule, ScheduleConfig
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import load_clip
from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.captions import CLEAR, NOISY

BATCH_SIZE = 250
PROMPTS = (*map(digit_prompt, range(NUM_CLASSES)), CLEAR, NOISY)
PLAINLY_NOISY_FROM = 20  # timestep of the cosine schedule; the noise at lower timesteps is hard to see


@dataclass(frozen=True, slots=True)
class ClipScores:
    """The CLIP scores of a set of digits."""

    recognised: float  # share of pictures whose most similar prompt, of ten, is that of their digit
    clear: float  # share of pictures more similar to CLEAR than to NOISY
    similarity: float  # mean cosine similarity of a picture and the prompt of its digit


class ClipScorer:
    """Computes cosine similarities of 8-bit pictures and prompts with a CLIP model."""

    def __init__(self, name: str = EMBEDDED_NAME) -> None:
        """Loads a model by its name (see model.clip.Clip). Raises ScriptError if it cannot be loaded."""
        self.clip = load_clip(name)
        self.name, self.sha256 = name, self.clip.sha256

    @torch.inference_mode()
    def similarities(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns cosine similarities (N, len(prompts)) of uint8 images (N, 1, H, W)."""
        texts = self.clip.embed_prompts(prompts)  # (P, E)
        batches = images.split(BATCH_SIZE)
        return torch.cat([self.clip.embed_images(from_pixels(batch)) @ texts.T for batch in batches])

    def score(self, digits: ImageSet) -> ClipScores:
        """Returns the scores of these digits."""
        similarities = self.similarities(digits.images, list(PROMPTS))  # (N, 12)
        by_digit, clear, noisy = similarities[:, :NUM_CLASSES], similarities[:, -2], similarities[:, -1]
        return ClipScores(
            recognised=(by_digit.argmax(dim=1) == digits.labels).double().mean().item(),
            clear=(clear > noisy).double().mean().item(),
            similarity=by_digit.gather(1, digits.labels[:, None]).mean().item(),
        )

    def tells_noise(self, digits: ImageSet, scores: ClipScores) -> float:
        """Returns the accuracy of deciding between clear and noisy pictures, 0.5 for guessing.

        The pictures are the clear digits, with their `scores`, and the same digits at t = 20 to 100.
        """
        return (scores.clear + 1 - self.score(noised(digits)).clear) / 2


def noised(digits: ImageSet) -> ImageSet:
    """Adds noise of the cosine schedule: t goes from 20 to 100 and starts again. The noise has a fixed seed."""
    diffusion = Diffusion(Schedule(ScheduleConfig(kind="cosine")), torch.Generator().manual_seed(0))
    t = PLAINLY_NOISY_FROM + torch.arange(len(digits.images)) % (diffusion.num_steps + 1 - PLAINLY_NOISY_FROM)  # (N,)
    x_t, _ = diffusion.add_noise(from_pixels(digits.images), t)
    return ImageSet(to_pixels(x_t), digits.labels)


def as_json(scorer: ClipScorer, drawn: ClipScores, real: ClipScores, tells_noise: float) -> dict[str, Any]:
    """Returns the scores of generated and of real digits for evaluation.json."""
    of_real = {**asdict(real), "tells_noise": tells_noise}
    return {"model": scorer.name, "weights_sha256": scorer.sha256, "drawn": asdict(drawn), "real": of_real}


def as_markdown(scorer: ClipScorer, drawn: ClipScores, real: ClipScores, tells_noise: float) -> str:
    """Returns rows for the table of `quality.as_markdown`."""
    rows = [
        ("recognised as asked", f"{drawn.recognised:.2%}", f"{real.recognised:.2%}"),
        ("more clear than noisy", f"{drawn.clear:.2%}", f"{real.clear:.2%}"),
        ("accuracy for clear or noisy (t = 20 to 100)", "", f"{tells_noise:.2%}"),
        ("similarity to the digit's prompt", f"{drawn.similarity:.3f}", f"{real.similarity:.3f}"),
    ]
    return "\n".join(f"| CLIP {scorer.name}: {name} | {value} | {of_real} |" for name, value, of_real in rows)
