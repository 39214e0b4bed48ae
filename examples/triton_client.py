"""The official HTTP client of Triton: reads the metadata of the model, generates digits and saves them as PNG files.

Install: pip install 'tritonclient[http]' pillow
Run:     python examples/triton_client.py [FOLDER]
"""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

URL = urlsplit(os.environ.get("UNFOG_URL", "http://127.0.0.1:8000"))
KEY = os.environ.get("UNFOG_API_KEY")
MODEL = "default"


def tensor(name: str, values: list[int]) -> InferInput:
    """Returns an input of type INT64 with shape (N,), which is sent in binary form."""
    array = np.array(values, dtype=np.int64)
    value = InferInput(name, array.shape, "INT64")
    value.set_data_from_numpy(array)
    return value


def main(folder: Path) -> None:
    client = InferenceServerClient(URL.netloc, ssl=URL.scheme == "https")
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    metadata = client.get_model_metadata(MODEL, headers=headers)
    for kind in ("inputs", "outputs"):
        for each in metadata[kind]:
            print(f"{kind}: {each['name']} {each['datatype']} {each['shape']}")

    # A request is a batch: each image has its own digit and its own seed.
    digits, seeds = [7, 7, 3], [2, 3, 4]
    result = client.infer(
        MODEL,
        [tensor("digit", digits), tensor("seed", seeds)],
        outputs=[InferRequestedOutput("image")],
        parameters={"sampler": "dpmpp", "num_steps": 10},
        headers=headers,
    )
    images = result.as_numpy("image")  # (N, 28, 28, 1) uint8
    for digit, seed, image in zip(digits, seeds, images, strict=True):
        path = folder / f"digit-{digit}-seed-{seed}.png"
        Image.fromarray(image[..., 0]).save(path)
        print("wrote", path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
