"""Trains the small CLIP model for digits and writes it in open_clip's format.

For each picture it is known which captions are true, so every pair of a picture and a caption counts. The loss is the
sigmoid loss of SigLIP (Zhai 2023, section 3.2). The sign of a pair says whether its caption is true.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.diffusion import Diffusion
from model.files import write_atomically, write_json
from model.precision import fast_dtype
from model.schedule import Schedule, ScheduleConfig
from scripts.common.data.data_set import ImageSet
from scripts.common.mnist import DATA_OF_FEATURES, TRAINING_DATA, load_mnist, split_unlearned, split_validation
from scripts.common.progress import Reporter, require
from scripts.evaluation.captions import CAPTIONS, Scene, make_scene, truth
from scripts.evaluation.classifier_training import Batches, fit
from scripts.evaluation.clip import ClipScorer

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 28,
        "patch_size": 4,
        "width": 96,
        "layers": 4,
        "head_width": 32,
        "pool_type": "avg",
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "init_logit_bias": 0.0,
}
WORDS = "token_embedding.weight"
MEAN, STD = 0.1307, 0.3081  # mean and standard deviation of MNIST's pixels
BATCH_SIZE = 256
EPOCHS = 20
MAX_LR, WEIGHT_DECAY = 1.5e-3, 0.05


def train_and_save_clip(
    folder: Path, data_dir: Path, reporter: Reporter, *, epochs: int, seed: int, for_features: bool
) -> None:
    """Trains a CLIP model on MNIST's training split, saves it, and evaluates the saved model on real digits.

    With `for_features`, it does not learn the digits with which distances are measured.

    Raises ScriptError if the data cannot be read.
    """
    open_clip = require("open_clip", extra="evaluate")
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (load_mnist(split, data_dir) for split in ("train", "test"))
    learn, choose = split_validation(*train)
    if for_features:
        learn, _ = split_unlearned(*learn)
    model = open_clip.CLIP(**MODEL)
    tokens = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(CAPTIONS)
    train_clip(model, tokens, ImageSet(*learn), reporter, epochs=epochs, seed=seed)
    data = DATA_OF_FEATURES if for_features else TRAINING_DATA
    facts: dict[str, Any] = {"data": data, "epochs": epochs, "seed": seed}
    save_clip(folder, model, tokens, facts)
    scorer = ClipScorer(str(folder))
    for name, digits in (("validation", ImageSet(*choose)), ("test", ImageSet(*test))):
        scores = scorer.score(digits)
        recognised, told = scores.recognised, scorer.tells_noise(digits, scores)
        facts[name] = {"recognised": recognised, "tells_noise": told}
        reporter.line(f"{name} split: {recognised:.2%} recognised, {told:.2%} correct as clear or noisy")
    save_config(folder, facts)
    reporter.line(f"Saved in {folder}")


def train_clip(
    model: nn.Module,
    tokens: Tensor,
    learn: ImageSet,
    reporter: Reporter,
    *,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> None:
    """Trains `model` on digits, uint8 (N, 1, 28, 28) with labels (N,), and captions. It ends with averaged weights."""
    diffusion = Diffusion(Schedule(ScheduleConfig(kind="cosine")), torch.Generator().manual_seed(seed))

    def loss_of(rows: Tensor) -> Tensor:
        return _pair_loss(model, tokens, make_scene(learn.images[rows], learn.labels[rows], diffusion))

    batches = Batches(len(learn), batch_size, epochs, diffusion.generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR, weight_decay=WEIGHT_DECAY)
    fit(model, loss_of, batches, optimizer, reporter, title="training a CLIP model", warm_up=0.1)


def _pair_loss(model: Any, tokens: Tensor, scene: Scene) -> Tensor:
    """Returns the loss (Zhai 2023, section 3.2), without undecided pairs. True and false pairs have equal weight."""
    x = ((scene.pictures - MEAN) / STD).expand(-1, 3, -1, -1)  # (B, 3, 28, 28)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype(x.device) == torch.bfloat16)
    with mixed, sdpa_kernel(SDPBackend.MATH):  # the gradient of fused attention is slow
        pictures = F.normalize(model.encode_image(x).float(), dim=1)  # (B, E)
        texts = F.normalize(model.encode_text(tokens).float(), dim=1)  # (P, E)
    logits = model.logit_scale.exp() * pictures @ texts.T + model.logit_bias  # (B, P)
    sign = truth(scene)  # (B, P)
    losses = -F.logsigmoid(sign * logits)
    return losses[sign > 0].mean() + losses[sign < 0].mean()


def save_clip(folder: Path, model: nn.Module, tokens: Tensor, facts: dict[str, Any]) -> None:
    """Writes float16 weights and the configuration for `open_clip.create_model("local-dir:<folder>")`.

    Embeddings of words that no caption uses are set to zero, so that the file compresses well.
    """
    tensors = {name: t.detach().half().clone() for name, t in model.state_dict().items()}
    known = torch.zeros(len(tensors[WORDS]), 1, dtype=torch.float16)
    known[tokens.unique()] = 1
    tensors[WORDS] *= known
    write_atomically(folder / "open_clip_model.safetensors", serialize(tensors))
    save_config(folder, facts)


def save_config(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the configuration of the model for open_clip, with facts about the training."""
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess, "training": facts}
    write_json(folder / "open_clip_config.json", config)
