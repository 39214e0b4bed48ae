"""Trains the judge, on MNIST's training split alone: the test split is looked at once, when all is chosen."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.judge_net import JudgeNet, accuracy_and_loss
from scripts.mnist import NUM_VALIDATION, split_validation
from scripts.progress import Reporter

MAX_ROTATION = math.radians(12)
MAX_SCALING = 0.1
MAX_SHIFT = 2 / 14  # two pixels, where half the image's edge is 1
WEIGHT_DECAY = 0.02


def train_judge(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    reporter: Reporter,
    *,
    epochs: int = 14,
    batch_size: int = 256,
    max_lr: float = 4e-3,
    seed: int = 0,
) -> tuple[JudgeNet, dict[str, Any]]:
    """Learns from the training images less 5,000, keeps the epoch that does best on those; network and facts.

    `train` and `test` are images (N, 1, 28, 28) uint8 and labels (N,).
    """
    torch.manual_seed(seed)
    learn, choose = split_validation(*train)
    network = JudgeNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    optimizer = torch.optim.AdamW(network.parameters(), lr=max_lr, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(learn[0]) // batch_size)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps, pct_start=0.2)
    best, best_epoch, best_rank = network, 0, (0.0, -math.inf)
    for epoch in range(1, epochs + 1):
        _run_epoch(network, optimizer, lr_schedule, *learn, batch_size, reporter, f"epoch {epoch}/{epochs}")
        accuracy, loss = accuracy_and_loss(network.eval(), *choose)
        reporter.line(f"epoch {epoch}/{epochs}  held-out accuracy {accuracy:.2%}  loss {loss:.4f}")
        if (accuracy, -loss) > best_rank:
            best, best_epoch, best_rank = copy.deepcopy(network), epoch, (accuracy, -loss)
    facts = {
        "test_accuracy": accuracy_and_loss(best, *test)[0],
        "num_test": len(test[0]),
        "validation_accuracy": best_rank[0],
        "data": f"MNIST, training split; the last {NUM_VALIDATION} images chose the epoch",
        "augmentation": "shift 2 pixels, rotation 12 degrees, scale 10 %",
        "epochs": epochs,
        "best_epoch": best_epoch,
        "batch_size": batch_size,
        "max_lr": max_lr,
        "seed": seed,
    }
    return best, facts


def _run_epoch(
    network: JudgeNet,
    optimizer: torch.optim.Optimizer,
    lr_schedule: torch.optim.lr_scheduler.LRScheduler,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    reporter: Reporter,
    description: str,
) -> None:
    network.train()
    num_batches = len(images) // batch_size
    batches = torch.randperm(len(images))[: num_batches * batch_size].view(num_batches, batch_size)
    with reporter.task(description, num_batches * batch_size, "images") as task:
        for rows in batches:
            x = augment(images[rows]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(x)
            loss = nn.functional.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
            task.advance(batch_size, f"loss {loss.item():.4f}")


def augment(images: Tensor) -> Tensor:
    """uint8 (B, 1, 28, 28) -> [0, 1], each turned, scaled and shifted a little at random."""
    angle, scaling, shift_x, shift_y = (2 * torch.rand(4, len(images)) - 1).unbind()  # (B,) each in [-1, 1]
    angle, zoom = MAX_ROTATION * angle, 1 + MAX_SCALING * scaling
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    top = torch.stack([cos, -sin, MAX_SHIFT * shift_x], dim=1)  # (B, 3)
    bottom = torch.stack([sin, cos, MAX_SHIFT * shift_y], dim=1)  # (B, 3)
    positions = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images / 255, positions, align_corners=False)
