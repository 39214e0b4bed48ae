"""Makes the checkpoint that ships from a run's: `python -m scripts.ship runs/default/model.safetensors`.

The weights are stored in float16, half the bytes; the recommended guidance and the evaluation go into
the metadata, and the known picture is drawn anew with that guidance.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import SHIPPED, SHIPPED_FAST, Checkpoint, CheckpointError
from model.sampler import Guidance
from scripts.arguments import Parser, guidance_scale, integer
from scripts.progress import fail

MAX_BYTES = 12_000_000  # all that ships, so that a clone stays small


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes the checkpoint."""
    args = _parse(argv)
    try:
        loaded = checkpoint.load(args.checkpoint)
        target = args.out or (SHIPPED_FAST if loaded.config.steps else SHIPPED)
        ship(loaded, target, _guidance(args), [_evaluation(path, loaded) for path in args.evaluation])
    except (CheckpointError, OSError, ValueError) as error:
        raise fail(f"ship: {error}".splitlines()[0]) from error
    print(f"{target}: {target.stat().st_size:,} bytes")


def ship(loaded: Checkpoint, target: Path, guidance: Guidance, evaluations: list[dict[str, Any]]) -> None:
    """Writes it with another guidance and with its evaluations; ValueError if all that ships were too large then."""
    training = {**loaded.config.training, "evaluation": evaluations}
    config = replace(loaded.config, guidance=guidance, training=training)
    beside = sum(path.stat().st_size for path in target.parent.glob("*.safetensors") if path.name != target.name)
    if 2 * sum(p.numel() for p in loaded.network.parameters()) + beside > MAX_BYTES:
        raise ValueError(f"with {target} more than {MAX_BYTES:,} bytes would ship")
    checkpoint.save(target, loaded.network, config, dtype=torch.float16)


def _guidance(args: argparse.Namespace) -> Guidance:
    return Guidance(args.guidance_scale, args.guidance_start, args.guidance_stop)


def _evaluation(path: Path, loaded: Checkpoint) -> dict[str, Any]:
    """Without the SHA-256 of the file that was judged, which ships under another; ValueError if it was not this one."""
    evaluation = dict(json.loads(path.read_text("utf-8")))
    if evaluation.pop("checkpoint_sha256", None) != loaded.sha256:
        raise ValueError(f"{path} is not an evaluation of this checkpoint")
    return evaluation


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.ship", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run's model.safetensors")
    parser.add_argument("--guidance-scale", type=guidance_scale, required=True, help="the recommended one; 1 = off")
    parser.add_argument("--guidance-start", type=integer(1), default=1, metavar="T", help="lowest timestep guided")
    parser.add_argument("--guidance-stop", type=integer(1), default=100, metavar="T", help="highest timestep guided")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], help="evaluation.json of `python -m scripts.evaluate digits`"
    )
    parser.add_argument(
        "--out", type=Path, help="default: where it is served from, default.safetensors or a student's fast.safetensors"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
