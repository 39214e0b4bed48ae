"""Runs an alternative server on loopback: `python -m scripts.benchmark.alternatives NAME PORT`."""

from pathlib import Path

from model.compiled.memory import keep_freed_memory
from scripts.common.arguments import Parser, integer
from scripts.common.progress import require

PIPELINES = ("pipeline-example", "pipeline-litserve")
NAMES = ("locked", "batched", "litserve", "diffusers", "diffusers-tuned", "diffusers-compiled", *PIPELINES)


def main() -> None:
    """Parses the arguments and runs the server until the process is stopped."""
    parser = Parser(prog="python -m scripts.benchmark.alternatives")
    parser.add_argument("name", choices=NAMES, help="the server to run")
    parser.add_argument("port", type=integer(1, 65535), help="port on 127.0.0.1")
    parser.add_argument("--max-images", type=integer(1), default=64, help="images per batch; default: 64")
    parser.add_argument(
        "--batch-timeout", type=float, default=0.01, help="batch_timeout of LitServe in seconds; default: 0.01"
    )
    parser.add_argument("--folder", type=Path, help="the pipeline of diffusers that the names pipeline-* serve")
    args = parser.parse_args()
    if (args.name in PIPELINES) != bool(args.folder):
        parser.error(f"--folder belongs to the names {' and '.join(PIPELINES)}")
    keep_freed_memory()  # the service also does this
    if args.folder:
        _serve_pipeline(args.name, args.port, args.folder, args.max_images, args.batch_timeout)
    else:
        _serve(args.name, args.port, args.max_images, args.batch_timeout)


def _serve(name: str, port: int, max_images: int, batch_timeout: float) -> None:
    """Runs the server until the process is stopped. `batch_timeout` is in seconds."""
    if name == "locked":
        from scripts.benchmark.alternatives import locked

        locked.serve(port)
    elif name == "batched":
        from scripts.benchmark.alternatives import batched

        batched.serve(port, max_images)
    elif name == "litserve":
        require("litserve", "bench")
        from scripts.benchmark.alternatives import litserve

        litserve.serve(port, max_images, batch_timeout)
    else:
        require("diffusers", "bench")
        from scripts.benchmark.alternatives import diffusers

        diffusers.serve(
            port,
            tuned=name != "diffusers",
            compiled_for=max_images if name == "diffusers-compiled" else 0,
        )


def _serve_pipeline(name: str, port: int, folder: Path, max_images: int, batch_timeout: float) -> None:
    """Runs the server until the process is stopped. `batch_timeout` is in seconds."""
    require("diffusers", "bench")
    if name == "pipeline-example":
        from scripts.benchmark.alternatives import pipelines

        pipelines.serve(port, folder)
    else:
        require("litserve", "bench")
        from scripts.benchmark.alternatives import pipelines_litserve

        pipelines_litserve.serve(port, folder, max_images, batch_timeout)


if __name__ == "__main__":
    main()
