"""Makes the checkpoint that ships from a run's: `python -m scripts.ship runs/default/model.safetensors`.

The weights are stored in float16, half the bytes; the guidance is the preset's that is named, where a sweep has
found a better one than was trained with. Then evaluate what ships, and ship that once more with its evaluations:
they go into the metadata, and name the weights that they are of.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, SHIPPED_FAST, Checkpoint, CheckpointConfig, weights_sha256
from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.evaluation.tables import Evaluation, read_evaluation
from scripts.training.recipe import Recipe, load_recipe

STORED_AS = torch.float16
MAX_BYTES = 12_000_000  # of all checkpoints that ship: a clone stays small


@reports_errors("ship")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the checkpoint."""
    args = _parse(argv)
    loaded = checkpoint.load(args.checkpoint)
    target = args.out or (SHIPPED_FAST if loaded.config.steps else SHIPPED)
    recipe = load_recipe(args.guidance_of) if args.guidance_of else None
    ship(loaded, target, recipe, {path: read_evaluation(path) for path in args.evaluation})
    print(f"{target}: {target.stat().st_size:,} bytes")


def ship(loaded: Checkpoint, target: Path, recipe: Recipe | None, evaluations: dict[Path, Evaluation]) -> None:
    """Writes the checkpoint with its evaluations and the recipe's guidance.

    Raises ScriptError if an evaluation or the guidance does not fit, or if all shipped checkpoints become too large.
    """
    config = replace(loaded.config, training={**loaded.config.training, "evaluation": [*evaluations.values()]})
    if recipe:
        try:
            config = replace(config, guidance=recipe.guidance, guidance_by_sampler=recipe.guidance_by_sampler)
        except ValueError as error:
            raise ScriptError(str(error)) from error
    weights = weights_sha256(loaded.network, STORED_AS)
    for path, evaluation in evaluations.items():
        _check(path, evaluation, config, weights)
    beside = sum(path.stat().st_size for path in target.parent.glob("*.safetensors") if path.name != target.name)
    if 2 * sum(p.numel() for p in loaded.network.parameters()) + beside > MAX_BYTES:
        raise ScriptError(f"with {target} more than {MAX_BYTES:,} bytes would ship")
    checkpoint.save(target, loaded.network, config, dtype=STORED_AS)


def _check(path: Path, evaluation: Evaluation, config: CheckpointConfig, weights: str) -> None:
    """Raises ScriptError for an evaluation of other weights or with a guidance that is not recommended."""
    options = evaluation.get("options")
    if evaluation.get("weights_sha256") != weights or not options:
        raise ScriptError(f"{path} is not an evaluation of these weights, rounded as they ship")
    recommended = config.guidance_of(options["sampler"])
    if options["guidance"]["scale"] != 1 and options["guidance"] != asdict(recommended):
        raise ScriptError(f"{path} was guided otherwise than what ships recommends: {recommended}")


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
