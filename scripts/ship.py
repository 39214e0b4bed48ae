"""Makes the checkpoint that ships from a run's: `python -m scripts.ship runs/default/model.safetensors`.

The weights are stored in float16, half the bytes; the guidance is the preset's that is named, where a sweep has
found a better one than was trained with. Then evaluate what ships, and ship that once more with its evaluations:
they go into the metadata.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, SHIPPED_FAST, Checkpoint, CheckpointError
from scripts.arguments import Parser
from scripts.progress import fail
from scripts.recipe import Recipe, RecipeError, load_recipe

MAX_BYTES = 12_000_000  # all that ships, so that a clone stays small


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the checkpoint."""
    args = _parse(argv)
    try:
        loaded = checkpoint.load(args.checkpoint)
        target = args.out or (SHIPPED_FAST if loaded.config.steps else SHIPPED)
        recipe = load_recipe(args.guidance_of) if args.guidance_of else None
        ship(loaded, target, recipe, [_evaluation(path, loaded) for path in args.evaluation])
    except (CheckpointError, RecipeError, OSError, ValueError) as error:
        raise fail(f"ship: {error}".splitlines()[0]) from error
    print(f"{target}: {target.stat().st_size:,} bytes")


def ship(loaded: Checkpoint, target: Path, recipe: Recipe | None, evaluations: list[dict[str, Any]]) -> None:
    """Writes it with its evaluations and the recipe's guidance; ValueError if all that ships were too large then."""
    if evaluations and not all(torch.equal(p, p.half().float()) for p in loaded.network.parameters()):
        raise ValueError("shipping rounds these weights: ship them first, then what ships with its evaluation")
    config = replace(loaded.config, training={**loaded.config.training, "evaluation": evaluations})
    if recipe:
        config = replace(config, guidance=recipe.guidance, guidance_by_sampler=recipe.guidance_by_sampler)
    beside = sum(path.stat().st_size for path in target.parent.glob("*.safetensors") if path.name != target.name)
    if 2 * sum(p.numel() for p in loaded.network.parameters()) + beside > MAX_BYTES:
        raise ValueError(f"with {target} more than {MAX_BYTES:,} bytes would ship")
    checkpoint.save(target, loaded.network, config, dtype=torch.float16)


def _evaluation(path: Path, loaded: Checkpoint) -> dict[str, Any]:
    """Without the SHA-256 of the file that was judged, which ships under another; ValueError if it was not this one."""
    evaluation = dict(json.loads(path.read_text("utf-8")))
    if evaluation.pop("checkpoint_sha256", None) != loaded.sha256:
        raise ValueError(f"{path} is not an evaluation of this checkpoint")
    return evaluation


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.ship", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run's model.safetensors")
    parser.add_argument(
        "--guidance-of", metavar="PRESET", help="whose guidance is recommended; default: the checkpoint keeps its own"
    )
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], help="evaluation.json of `python -m scripts.evaluate digits`"
    )
    parser.add_argument(
        "--out", type=Path, help="default: where it is served from, default.safetensors or a student's fast.safetensors"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
