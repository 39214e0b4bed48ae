"""Writes the checkpoint of the repository from that of a run: `python -m scripts.ship runs/default/model.safetensors`.

Stores the weights in float16, which halves the file size. --guidance-of replaces the recommended guidance by that of a
preset. To add evaluations to the metadata, evaluate the written checkpoint, then run this script again with
--evaluation. An evaluation contains a digest of the evaluated weights, which must match.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig, Normalisation, weights_sha256
from model.spec import SHIPPED, SHIPPED_FAST
from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.evaluation.tables import Evaluation, read_evaluation
from scripts.training.recipe import Recipe, load_recipe

STORED_AS = torch.float16
MAX_BYTES = 30_000_000  # limit for all checkpoints in the repository together, to keep a clone small


@reports_errors("ship")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    loaded = checkpoint.load(args.checkpoint)
    target = args.out or (SHIPPED_FAST if loaded.config.steps else SHIPPED)
    recipe = load_recipe(args.guidance_of) if args.guidance_of else None
    evaluations = {path: read_evaluation(path) for path in args.evaluation}
    ship(loaded, target, recipe, evaluations, args.normalisation)
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


def ship(
    loaded: Checkpoint,
    target: Path,
    recipe: Recipe | None,
    evaluations: dict[Path, Evaluation],
    normalisation: Normalisation | None = None,
) -> None:
    """Writes the checkpoint with its evaluations and with the guidance of the recipe.

    Raises ScriptError if an evaluation or the guidance does not match the checkpoint, or if the checkpoints in the
    target folder would exceed MAX_BYTES together.
    """
    config = replace(loaded.config, training={**loaded.config.training, "evaluation": [*evaluations.values()]})
    if normalisation:
        try:
            config = replace(config, normalisation=normalisation)
        except ValueError as error:
            raise ScriptError(str(error)) from error
    if recipe:
        try:
            config = replace(config, guidance=recipe.guidance, guidance_by_sampler=recipe.guidance_by_sampler)
        except ValueError as error:
            raise ScriptError(str(error)) from error
    weights = weights_sha256(loaded.network, STORED_AS)
    for path, evaluation in evaluations.items():
        _check(path, evaluation, config, weights)
    other_bytes = sum(path.stat().st_size for path in target.parent.glob("*.safetensors") if path.name != target.name)
    if 2 * sum(p.numel() for p in loaded.network.parameters()) + other_bytes > MAX_BYTES:
        raise ScriptError(f"with {target}, the checkpoints in {target.parent} would have more than {MAX_BYTES:,} bytes")
    checkpoint.save(target, loaded.network, config, dtype=STORED_AS)


def _check(path: Path, evaluation: Evaluation, config: CheckpointConfig, weights: str) -> None:
    """Raises ScriptError if the weights or the guidance of the evaluation differ from those of the checkpoint."""
    options = evaluation.get("options")
    if evaluation.get("weights_sha256") != weights or not options:
        raise ScriptError(f"{path} is not an evaluation of these weights in float16. Evaluate the written checkpoint")
    recommended = config.guidance_of(options["sampler"])
    if options["guidance"]["scale"] != 1 and options["guidance"] != asdict(recommended):
        raise ScriptError(
            f"{path} was evaluated with guidance {options['guidance']}, but the checkpoint recommends {recommended}"
        )


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.ship", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="model.safetensors of a run")
    parser.add_argument(
        "--guidance-of",
        metavar="PRESET",
        help="preset whose guidance the checkpoint will recommend; default: keep its own",
    )
    parser.add_argument(
        "--normalisation",
        choices=get_args(Normalisation),
        help="how the service prepares pictures for the checkpoint: mnist for handwriting of 28x28 pixels; default: "
        "keep its own",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        help="evaluation.json files of `python -m scripts.evaluate digits`",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write; default: default.safetensors in model/weights, which the service loads; "
        "fast.safetensors for a distilled student. Overwrites the tracked file",
    )
    return parser


if __name__ == "__main__":
    main()
