"""Generates pictures of a running service with a tiny network again, with the service and with scripts.sample."""

import hashlib
import io
import socket
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from model.png import SOFTWARE, encode_png
from scripts import sample
from tests.app.picture_samples import chunk, zeros
from tests.e2e.service import JSON, PNG, ZIP, Service, assert_problem, open_png, pngs

BODIES: dict[str, dict[str, Any]] = {
    "default": {"digit": 7, "seed": 1, "num_steps": 30},
    "scaled": {"digit": 2, "seed": 3, "num_steps": 20, "sampler": "ddim", "scale": 5},
    "sheet": {"digit": 3, "seed": 2**53 - 1, "count": 9, "num_steps": 9, "sampler": "dpmpp", "guidance_scale": 1.7},
    "large sheet": {"digit": 0, "seed": 0, "count": 64, "num_steps": 3, "scale": 16},
}


def draw(service: Service, accept: str = PNG, **body: Any) -> bytes:
    response = service.post(body, accept)
    assert response.status_code == 200, response.text
    return response.content


def reproduce(service: Service, png: bytes, accept: str = JSON) -> httpx.Response:
    return service.client.post("/reproduce", files={"image": png}, headers={"accept": accept})


def altered(png: bytes, *, amount: int = 0, **chunks: str) -> bytes:
    """Returns the picture with another grey level of one pixel and with other text chunks."""
    pixels, text, _ = open_png(png)
    changed = pixels.copy()
    changed[5, 6] ^= amount
    return encode_png(Image.fromarray(changed), text={**text, **chunks})


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_service_and_script_generate_a_picture_again_with_the_same_bytes(
    service: Service, checkpoint: Path, tmp_path: Path, body: dict[str, Any]
) -> None:
    png = draw(service, **body)
    again = reproduce(service, png, PNG)
    assert (again.status_code, again.headers["x-identical"]) == (200, "true")
    assert again.content == png
    answer = reproduce(service, png)
    expected = {"identical": True, "reason": None, "different_pixels": 0, "largest_difference": 0}
    assert expected.items() <= answer.json().items()
    assert pngs(answer) == service.images(**body)
    (tmp_path / "picture.png").write_bytes(png)
    options = ["--like", str(tmp_path / "picture.png"), f"--checkpoint={checkpoint}", "--compile=off"]
    sample.main([*options, f"--out={tmp_path / 'again.png'}"])
    assert (tmp_path / "again.png").read_bytes() == png


def test_image_of_an_archive_is_generated_again_with_its_index(service: Service) -> None:
    content = draw(service, ZIP, digit=4, seed=8, count=5, num_steps=10)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert len(set(files)) == 5
    for file in files:
        assert reproduce(service, file, PNG).content == file


def test_altered_pixel_is_found(service: Service) -> None:
    png = draw(service, digit=7, seed=1, num_steps=5)
    answer = reproduce(service, altered(png, amount=1))
    assert answer.headers["x-identical"] == "false"
    expected = {"identical": False, "reason": "other_pixels", "different_pixels": 1, "largest_difference": 1}
    assert expected.items() <= answer.json().items()
    assert reproduce(service, altered(png, amount=1), PNG).content == png


@pytest.mark.parametrize(
    "changed", [{"Seed": "2"}, {"Digit": "8", "Label": "8"}, {"Index": "1"}, {"Sampler": "ddim"}], ids=str
)
def test_altered_chunk_gives_large_differences(service: Service, changed: dict[str, str]) -> None:
    png = draw(service, digit=7, seed=1, num_steps=5, guidance_scale=1)
    answer = reproduce(service, altered(png, **changed)).json()
    assert (answer["identical"], answer["reason"]) == (False, "other_pixels")
    assert answer["different_pixels"] > 100
    assert answer["largest_difference"] > 50


def test_picture_of_another_release_is_compared(service: Service) -> None:
    png = altered(draw(service, digit=7, seed=1, num_steps=5), Software="unfog 0.0.1")
    assert reproduce(service, png).json()["identical"] is True
    assert open_png(reproduce(service, png, PNG).content)[1]["Software"] == SOFTWARE
    assert reproduce(service, altered(png, amount=1)).json()["reason"] == "other_release"


def hostile(png: bytes) -> dict[str, bytes]:
    """Returns hostile variants of a picture, by name. None of them can be generated again."""
    header, rest = png[:33], png[33:]
    seed = chunk(b"tEXt", b"Seed\x001")
    text = b"".join(chunk(b"tEXt", f"{name}\0{value}".encode()) for name, value in open_png(png)[1].items())
    large = np.zeros((4096, 4096), np.uint8)
    return {
        "repeated chunk": header + seed + rest,
        "many chunks": header + 30_000 * chunk(b"tEXt", b"A\x00b") + rest,
        "giant text": header + chunk(b"tEXt", b"Seed\0" + b"1" * 2**21) + rest,
        "giant number": altered(png, Seed="9" * 200),
        "compressed text": encode_png(Image.new("L", (28, 28)))[:33]
        + chunk(b"zTXt", b"Seed\0\0" + zeros(2**26))
        + rest[-12:],
        "damaged text": (header + text + rest[-12:]).replace(b"ddpm", b"ddim"),
        "huge range": altered(png, Index="0-999999999"),
        "no pixels": header + text + rest[-12:],
        "large picture": encode_png(Image.fromarray(large), text=open_png(png)[1]),
        "another task": altered(png, Task="denoise"),
        "without chunks": encode_png(Image.new("L", (28, 28))),
        "another checkpoint": altered(png, **{"Model-SHA256": "0" * 64}),
    }


def test_hostile_pictures_are_invalid_images(service: Service) -> None:
    for name, file in hostile(draw(service, digit=7, seed=1, num_steps=5, sampler="ddpm")).items():
        problem = assert_problem(reproduce(service, file), 422, "invalid_image")
        assert problem["errors"][0]["loc"] == ["body", "image"], name
        assert len(problem["detail"]) < 500, name
    assert not [line for line in service.process.lines if '"level": "error"' in line]


def test_picture_of_an_unserved_checkpoint_is_refused_with_the_digests(
    service: Service, fast_checkpoint: Path, checkpoint: Path, tmp_path: Path
) -> None:
    sample.main([f"--checkpoint={fast_checkpoint}", "--compile=off", "--digit=7", f"--out={tmp_path / 'x.png'}"])
    problem = assert_problem(reproduce(service, (tmp_path / "x.png").read_bytes()), 422, "invalid_image")
    for path in (fast_checkpoint, checkpoint):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in problem["detail"]


def test_client_that_leaves_cancels_the_images(service: Service) -> None:
    sheet = draw(service, digit=7, seed=1, count=64, num_steps=30)
    service.wait_until_idle()
    before = service.metrics().value("cancelled_total", stage="running")
    request = service.client.build_request("POST", "/reproduce", files={"image": sheet})
    content = request.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(service.address) as connection:
        connection.sendall(f"POST /reproduce HTTP/1.1\r\n{head}\r\n".encode() + content)
        service.wait_until_running()
    service.wait_for(before + 64, "cancelled_total", stage="running")
    service.wait_for(1, "requests_total", route="/reproduce", code="499")
    service.wait_until_idle()


def test_service_generates_the_pictures_of_the_script_again(service: Service, checkpoint: Path, tmp_path: Path) -> None:
    options = [f"--checkpoint={checkpoint}", "--compile=off", "--num-steps=5", "--seed=4"]
    sample.main([*options, "--digit=7", "--count=5", "--scale=3", f"--out={tmp_path / 'sheet.png'}"])
    sheet = (tmp_path / "sheet.png").read_bytes()
    assert reproduce(service, sheet, PNG).content == sheet
    sample.main([*options, "--digit=all", f"--out={tmp_path / 'all.png'}"])
    problem = assert_problem(reproduce(service, (tmp_path / "all.png").read_bytes()), 422, "invalid_image")
    assert "--like" in problem["detail"]
