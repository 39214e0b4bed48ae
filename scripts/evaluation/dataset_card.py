"""The card of a data set: README.md, in the format of dataset cards of the Hugging Face Hub."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from model.checkpoint import Checkpoint
from model.clip import name_without_folders
from model.png import SOFTWARE
from model.prompts import default_prompt
from model.spec import SHIPPED_MODELS
from scripts.common.drawing import DrawingRequest
from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.dataset_files import IDX
from scripts.evaluation.parquet import CLASS_NAMES, SPLIT_FILES, features_of

CARD = "README.md"
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}  # upper limit -> category
# Path of a shipped checkpoint -> its path in the repository, such as model/weights/default.safetensors.
SHIPPED_NAMES = {path.resolve(): "/".join(path.parts[-3:]) for path in SHIPPED_MODELS.values()}
# Fields of DrawingRequest that do not change the images, or that command_of writes from the facts.
NOT_COPIED = ("checkpoint", "seed", "batch_size", "compile", "num_threads")
FORMS = {
    "idx": f"The format is MNIST's: `{IDX[0]}` has the images and `{IDX[1]}` has the labels, in the same order.",
    "png": "Each image is an 8-bit greyscale PNG. The folders `0` to `9` are the labels.",
    "parquet": "The format is Parquet. `image` is an 8-bit greyscale PNG and `label` is the digit. `seed` and `index` "
    "identify the noise of an image, so that it can be generated again.",
}
CONFIDENCE = " `confidence` is the probability that a classifier, the judge, gives to the digit."


def card(facts: dict[str, Any], checkpoint: Checkpoint, command: str) -> str:
    """Returns the text of the card. `facts` are those of dataset.json, and `command` makes the data set again."""
    parts = [_front_matter(facts), _introduction(facts, checkpoint), _generation(facts, checkpoint, command)]
    parts += [_numbers(facts), *([_filter(facts)] if "min_confidence" in facts else []), _limits()]
    return "\n\n".join(parts) + "\n"


def command_of(request: DrawingRequest, facts: dict[str, Any]) -> str:
    """Returns the command that makes the data set. Options without an effect on the images are left out.

    The command has no absolute paths, because cards are published.
    """
    checkpoint = request.checkpoint.resolve()
    given: dict[str, Any] = {"out": "out/set", "format": facts["format"]}
    given["balance"] = ",".join(f"{digit}={count}" for digit, count in enumerate(facts["num_images"]) if count)
    given["checkpoint"] = SHIPPED_NAMES.get(checkpoint, checkpoint.name)
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name not in NOT_COPIED and value != field.default:
            given[field.name] = value.name if isinstance(value, Path) else value
    if request.clip_model:
        given["clip_model"] = name_without_folders(request.clip_model)
    given |= {"seed": facts["seed"], "compile": "on" if facts["compiled"] else "off"}
    if "min_confidence" in facts:
        given["min_confidence"] = facts["min_confidence"]
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["python", "-m", "scripts.make_dataset", *words])


def as_cell(value: Any) -> str:
    """Returns the value as JSON, for a cell of a Markdown table."""
    return json.dumps(value).replace("|", "\\|")


def _front_matter(facts: dict[str, Any]) -> str:
    size = next((name for limit, name in SIZES.items() if facts["count"] < limit), "1M<n<10M")
    lines = ["---", "pretty_name: Generated handwritten digits", "task_categories:", "- image-classification"]
    lines += ["size_categories:", f"- {size}", "tags:", "- synthetic", "- handwritten-digits"]
    if facts["format"] == "parquet":
        lines += ["dataset_info:", "  features:"]
        for name, feature in features_of(has_confidence="min_confidence" in facts).items():
            lines += [f"  - name: {name}", *_dtype(feature)]
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {SPLIT_FILES}"]
    return "\n".join([*lines, "---"])


def _dtype(feature: dict[str, Any]) -> list[str]:
    """Returns the lines of a feature's type in the YAML of `dataset_info`."""
    match feature["_type"]:
        case "ClassLabel":
            names = [f"          '{i}': '{name}'" for i, name in enumerate(CLASS_NAMES)]
            return ["    dtype:", "      class_label:", "        names:", *names]
        case "Image":
            return ["    dtype: image"]
        case _:
            return [f"    dtype: {feature['dtype']}"]


def _introduction(facts: dict[str, Any], checkpoint: Checkpoint) -> str:
    confidence = CONFIDENCE if facts["format"] == "parquet" and "min_confidence" in facts else ""
    return (
        f"# Generated handwritten digits\n\n"
        f"This data set has {_count(facts['count'], 'image')} of 28x28 pixels with white digits on black, like MNIST. "
        f"The digits were not written by hand: a diffusion model of the project unfog generated them. "
        f"{_training_data(checkpoint)} {FORMS[facts['format']]}{confidence}"
    )


def _training_data(checkpoint: Checkpoint) -> str:
    data = checkpoint.config.training.get("data")
    return (
        f"The checkpoint names this training data: {data}."
        if data
        else "The checkpoint does not name its training data."
    )


def _generation(facts: dict[str, Any], checkpoint: Checkpoint, command: str) -> str:
    options = facts["options"]
    guidance, clip = options["guidance"], options.get("clip")
    rows = {
        "software": SOFTWARE,
        "SHA-256 of the checkpoint": f"`{checkpoint.sha256}`",
        "SHA-256 of its weights": f"`{facts['weights_sha256']}`",
        "sampler": f"`{options['sampler']}`",
        "steps": options["num_steps"],
        "guidance": "off" if guidance["scale"] == 1 else _guided(guidance),
        **(_clip_rows(clip, checkpoint.config.class_names) if clip else {}),
        "seed": facts["seed"],
        "device, precision": f"{facts['device']}, {facts['dtype']}, {'' if facts['compiled'] else 'not '}compiled",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))  # longer than those in the prompt
    return (
        f"## How it was made\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"This command makes the data set again. It needs the checkpoint file above:\n\n"
        f"{fence}bash\n{command}\n{fence}"
    )


def _guided(guidance: dict[str, Any]) -> str:
    return f"scale {guidance['scale']:g} at t = {guidance['start']} to {guidance['stop']}"


def _clip_rows(clip: dict[str, Any], class_names: Sequence[str]) -> dict[str, str]:
    own = [clip["prompt"]] if clip["prompt"] is not None else map(default_prompt, class_names)
    return {
        "CLIP guidance": _guided(clip["guidance"]),
        "prompt": ", ".join(map(as_cell, own)),
        "CLIP model": as_cell(clip["model"]),
        "SHA-256 of the CLIP weights": f"`{clip['sha256']}`",
    }


def _numbers(facts: dict[str, Any]) -> str:
    counts = facts["num_images"]
    if "num_dropped" not in facts:
        body = "\n".join(f"| {digit} | {counts[digit]} |" for digit in range(NUM_CLASSES))
        return f"## Images per digit\n\n| digit | images |\n| --- | --- |\n{body}"
    dropped = facts["num_dropped"]
    lines = [_row(str(digit), counts[digit], dropped[digit]) for digit in range(NUM_CLASSES)]
    lines.append(_row("all", sum(counts), sum(dropped)))
    heading = "| digit | images | dropped by the filter | share dropped |\n| --- | --- | --- | --- |"
    return "\n".join(["## Images per digit\n", heading, *lines])


def _row(name: str, kept: int, dropped: int) -> str:
    share = f"{dropped / (kept + dropped):.2%}" if kept + dropped else "-"
    return f"| {name} | {kept} | {dropped} | {share} |"


def _filter(facts: dict[str, Any]) -> str:
    return (
        "## Filter\n\n"
        f"An image was kept only if a classifier, the judge, gave the requested digit a probability of at least "
        f"{facts['min_confidence']:g}. A dropped image was replaced by an image from other noise. The SHA-256 of the "
        f"judge is `{facts['judge_sha256']}`.\n\n"
        "The filter reduces the diversity: unusual and ambiguous digits are rarer than in an unfiltered set. Do not "
        "use the judge to measure how recognisable this data set is, because the judge selected the images."
    )


def _limits() -> str:
    return (
        "## Limits\n\n"
        "A label is the digit that was requested. Some images can show another digit or no digit. The digits have the "
        "style of the training data of the model.\n\n"
        "The code of unfog and the checkpoints that it ships have the MIT licence. These checkpoints were trained on "
        "MNIST, which has the licence CC BY-SA 3.0. This card has no field `license`: add one before you publish the "
        "data set."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
