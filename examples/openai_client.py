"""The official client of the OpenAI API: generates, edits and streams digits, and shows an error.

Install: pip install openai pillow
Run:     python examples/openai_client.py [FOLDER]
"""

import io
import os
import sys
from base64 import b64decode
from pathlib import Path

import openai
from PIL import Image

URL = os.environ.get("UNFOG_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("UNFOG_API_KEY", "none")  # The client requires a key, even if the service does not.


def half_mask(size: tuple[int, int]) -> bytes:
    """Returns a mask as a PNG file. Its lower half is transparent, so an edit fills in this half."""
    mask = Image.new("RGBA", size, "black")
    mask.paste((0, 0, 0, 0), (0, size[1] // 2, *size))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


def main(folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    print("models:", ", ".join(model.id for model in client.models.list()))

    # `seed` is not a field of OpenAI's API. The client adds the fields of `extra_body` to the request.
    images = client.images.generate(
        prompt="a handwritten seven", n=2, size="280x280", quality="medium", extra_body={"seed": 42}
    )
    for index, image in enumerate(images.data or []):
        (folder / f"generated-{index}.png").write_bytes(b64decode(image.b64_json or ""))
        print(f"wrote generated-{index}.png")

    picture = (folder / "generated-0.png").read_bytes()
    edited = client.images.edit(image=picture, mask=half_mask((280, 280)), prompt="7", size="280x280")
    for image in edited.data or []:
        (folder / "edited.png").write_bytes(b64decode(image.b64_json or ""))
        print("wrote edited.png")

    stream = client.images.generate(
        prompt="the digit 3", size="280x280", quality="medium", stream=True, partial_images=2
    )
    for event in stream:
        if event.type == "image_generation.partial_image":
            name = f"partial-{event.partial_image_index}.png"
        else:
            name = "streamed.png"
        (folder / name).write_bytes(b64decode(event.b64_json))
        print(f"wrote {name}")

    try:
        client.images.generate(prompt="a cat")
    except openai.BadRequestError as error:
        print(f"error {error.status_code} in {error.param}: {error.message}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
