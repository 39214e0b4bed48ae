"""Collects digits from a running service: `python -m scripts.collect http://127.0.0.1:8000 --out out/served`.

As many of each digit, a PNG each as the service sends them, in a folder that `scripts.evaluate digits --images` takes.
Options that are not given are the service's own.
"""

import argparse
import io
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from model.files import write_atomically, write_json
from model.sampler import SAMPLERS
from scripts.common.arguments import Parser, guidance_scale, integer, num_images
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.samples import FACTS

A_REQUEST = 50  # images: some are always running while others are packed
CLIENTS = 2
TIMEOUT = 600  # seconds
BUSY = (429, 503)  # which say when to ask again
OPTIONS = ("model", "num_steps", "sampler", "guidance_scale")


@reports_errors("collect")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, asks, and leaves the images in their folder."""
    args = _parse(argv)
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    with Reporter() as reporter:
        if args.out.exists() and any(args.out.iterdir()):
            raise ScriptError(f"{args.out} is not empty")
        health = _health(args.url)
        facts = {name: health.get(name) for name in ("version", "models", "device", "dtype", "compiled")}
        collect(args.url, options, args.out, reporter, count=args.num_images, seed=args.seed)
        write_json(args.out / FACTS, {**facts, "asked": options, "seed": args.seed})
        reporter.line(f"{args.num_images} images: {args.out}")


def collect(url: str, options: dict[str, Any], folder: Path, reporter: Reporter, *, count: int, seed: int) -> None:
    """`count` images, as many of each digit; each request has a seed of its own, from `seed` on."""
    each = count // NUM_CLASSES
    bodies = [
        {
            "digit": digit,
            "count": min(A_REQUEST, each - start),
            "seed": seed + NUM_CLASSES * (start // A_REQUEST) + digit,
            **options,
        }
        for start in range(0, each, A_REQUEST)
        for digit in range(NUM_CLASSES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with reporter.task(f"collecting {count} images", count, "images") as task, ThreadPoolExecutor(CLIENTS) as pool:
        for archive in pool.map(lambda body: _answer(f"{url}/generate", body), bodies):
            with ZipFile(io.BytesIO(archive)) as images:
                for name in images.namelist():
                    write_atomically(folder / Path(name).name, images.read(name))
                task.advance(len(images.namelist()))


def _health(url: str) -> dict[str, Any]:
    try:
        health: dict[str, Any] = json.loads(_answer(f"{url}/health"))
    except ValueError as error:  # the URL is not valid, or the answer is not JSON
        raise ScriptError(str(error)) from error
    return health


def _answer(url: str, body: dict[str, Any] | None = None) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/zip"} if body else {}
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        wait = error.headers.get("Retry-After", "")
        if error.code in BUSY and wait.isdecimal():
            time.sleep(int(wait))
            return _answer(url, body)
        raise ScriptError(f"{url} answered {error.code}: {_detail(error.read())}") from error
    except OSError as error:
        raise ScriptError(f"{url} does not answer: {error}") from error


def _detail(problem: bytes) -> str:
    try:
        return str(json.loads(problem)["detail"])
    except (ValueError, KeyError, TypeError):
        return "no reason"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", type=lambda text: text.rstrip("/"), help="of the service, like http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--num-images", type=num_images(NUM_CLASSES, 100_000), default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=integer(0, 2**52), default=0, help="of the first requests; default: 0")
    parser.add_argument("--model", help="default or fast")
    parser.add_argument("--num-steps", type=integer(1), help="steps of the reverse process")
    parser.add_argument("--sampler", choices=SAMPLERS)
    parser.add_argument("--guidance-scale", type=guidance_scale, help="1 = off")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
