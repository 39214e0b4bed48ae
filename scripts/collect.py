"""Requests digits from a running service: `python -m scripts.collect http://127.0.0.1:8000 --out out/served`.

Saves the PNGs of the service in one folder, with the same number of images of each digit. Evaluate the folder with
`scripts.evaluate digits --images`. The service's defaults apply to options that are not given.
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
from model.spec import SAMPLERS
from scripts.common.arguments import Parser, guidance_scale, integer, num_images
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.samples import FACTS

IMAGES_PER_REQUEST = 50
CLIENTS = 2  # two, so that the service generates images of one request while it encodes the other
TIMEOUT = 600  # seconds
RETRY_STATUSES = (429, 503)  # statuses with the header Retry-After
OPTIONS = ("model", "num_steps", "sampler", "guidance_scale")


@reports_errors("collect")
def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, requests the images and writes them to the folder."""
    args = build_parser().parse_args(argv)
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    with Reporter() as reporter:
        if args.out.exists() and any(args.out.iterdir()):
            raise ScriptError(f"{args.out} is not empty. Choose another folder for --out")
        health = _health(args.url)
        facts = {name: health.get(name) for name in ("version", "models", "device", "dtype", "compiled")}
        collect(args.url, options, args.out, reporter, count=args.num_images, seed=args.seed)
        write_json(args.out / FACTS, {**facts, "asked": options, "seed": args.seed})
        reporter.line(f"Wrote {args.num_images} images to {args.out}")


def collect(url: str, options: dict[str, Any], folder: Path, reporter: Reporter, *, count: int, seed: int) -> None:
    """Requests `count` images, equally many of each digit, and writes them to `folder`.

    The requests use different seeds, which start at `seed`. Raises ScriptError if a request fails.
    """
    each = count // NUM_CLASSES
    bodies = [
        {
            "digit": digit,
            "count": min(IMAGES_PER_REQUEST, each - start),
            "seed": seed + NUM_CLASSES * (start // IMAGES_PER_REQUEST) + digit,
            **options,
        }
        for start in range(0, each, IMAGES_PER_REQUEST)
        for digit in range(NUM_CLASSES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with reporter.task(f"requesting {count} images", count, "images") as task, ThreadPoolExecutor(CLIENTS) as pool:
        for archive in pool.map(lambda body: _answer(f"{url}/generate", body), bodies):
            with ZipFile(io.BytesIO(archive)) as images:
                for name in images.namelist():
                    write_atomically(folder / Path(name).name, images.read(name))
                task.advance(len(images.namelist()))


def _health(url: str) -> dict[str, Any]:
    try:
        health: dict[str, Any] = json.loads(_answer(f"{url}/health"))
    except ValueError as error:  # the URL is invalid, or the response is not JSON
        raise ScriptError(f"{url}/health: {error}. Check the URL of the service") from error
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
        if error.code in RETRY_STATUSES and wait.isdecimal():
            time.sleep(int(wait))
            return _answer(url, body)
        raise ScriptError(f"{url} answered with status {error.code}: {_detail(error.read())}") from error
    except OSError as error:
        raise ScriptError(f"No answer from {url}: {error}") from error


def _detail(problem: bytes) -> str:
    try:
        return str(json.loads(problem)["detail"])
    except (ValueError, KeyError, TypeError):
        return "no details in the response"


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "url", type=lambda text: text.rstrip("/"), help="URL of the service, such as http://127.0.0.1:8000"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the images; must be empty or new")
    parser.add_argument(
        "--num-images",
        type=num_images(NUM_CLASSES, 100_000),
        default=10_000,
        help="number of images, a multiple of 10; default: 10000",
    )
    parser.add_argument("--seed", type=integer(0, 2**52), default=0, help="seed of the first request; default: 0")
    parser.add_argument("--model", help="default or fast; default: the service's default")
    parser.add_argument(
        "--num-steps", type=integer(1), help="steps of the reverse process; default: the service's default"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the service's default")
    parser.add_argument("--guidance-scale", type=guidance_scale, help="1 = off; default: the service's default")
    return parser


if __name__ == "__main__":
    main()
