"""`python -m scripts.benchmark.alternatives NAME PORT`: serves one alternative until it is told to stop."""

import os

import torch

from model.compiled.memory import keep_freed_memory
from scripts.common.arguments import Parser, integer
from scripts.common.progress import require

NAMES = ("locked", "batched", "litserve", "diffusers", "diffusers-tuned", "diffusers-compiled")


def main() -> None:
    """Parses the arguments and serves."""
    parser = Parser(prog="python -m scripts.benchmark.alternatives")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("port", type=integer(1, 65535))
    parser.add_argument("--max-images", type=integer(1), default=64, help="of a batch; default: 64")
    parser.add_argument("--batch-timeout", type=float, default=0.01, help="LitServe's, in seconds; default: 0.01")
    parser.add_argument("--workers", type=integer(1), default=1, help="LitServe's processes; default: 1")
    parser.add_argument("--num-threads", type=integer(1, 1024), help="compute threads")
    args = parser.parse_args()
    if args.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(args.num_threads)  # for a worker process too
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()  # as the service does
    _serve(args.name, args.port, args.max_images, args.batch_timeout, args.workers)


def _serve(name: str, port: int, max_images: int, batch_timeout: float, workers: int) -> None:
    """Serves the alternative of that name until the process is stopped. `batch_timeout` is in seconds."""
    if name == "locked":
        from scripts.benchmark.alternatives import locked

        locked.serve(port)
    elif name == "batched":
        from scripts.benchmark.alternatives import batched

        batched.serve(port, max_images)
    elif name == "litserve":
        require("litserve", "bench")
        from scripts.benchmark.alternatives import litserve

        litserve.serve(port, max_images, batch_timeout, workers)
    else:
        require("diffusers", "bench")
        from scripts.benchmark.alternatives import diffusers

        diffusers.serve(
            port,
            tuned=name != "diffusers",
            compiled_for=max_images if name == "diffusers-compiled" else 0,
        )


if __name__ == "__main__":
    main()
