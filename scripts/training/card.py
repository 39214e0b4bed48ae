"""The card of a trained model: README.md in the run folder, in the format of model cards of the Hugging Face Hub."""

import math
import re
import shlex

from scripts.common.data.data_set import DataSet
from scripts.common.data.first_look import lines_about
from scripts.common.data.source import printable
from scripts.training.auto import describe
from scripts.training.run import MODEL, Run, earlier_data

CARD, CURVES = "README.md", "losses.png"
MOST_NAMED = 10  # classes in the first sentence


def markdown(text: str) -> str:
    """Escapes the characters that have a meaning in Markdown. Names of classes and of data can have any character."""
    text = re.sub(r"[\\`*_\[\]<>|~&$]", r"\\\g<0>", printable(text))
    return re.sub(r"^(\s*\d*)([#+=.)-])", r"\1\\\2", text)  # at its start, these begin a heading or a list


def card(run: Run, data: DataSet, num_parameters: int) -> str:
    """Returns the text of the card of a finished run."""
    return "\n\n".join(
        [_front_matter(), _introduction(run, data), _use(run), _data(run, data), _training(run, num_parameters)]
    )


def _front_matter() -> str:
    return "---\ntags:\n- diffusion\n- class-conditional\n- unfog\n---"


def _introduction(run: Run, data: DataSet) -> str:
    channels, side, _ = data.image_shape
    names, kind = [markdown(name) for name in data.class_names], "grey" if channels == 1 else "colour"
    shown = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    return (
        f"# {run.name}\n\nA diffusion model that generates {kind} images of {side}x{side} pixels. Its classes are "
        f"{shown}.\n\n![images of the classes after the last epoch](epochs/{len(run.results):02d}.png)"
    )


def _use(run: Run) -> str:
    path, label = run.folder / MODEL, f"--label={run.class_names[0]}"
    sample = shlex.join(["--checkpoint", str(path), label, "--count", "16", "--out", "sheet.png"])
    return f"""## Use

```bash
scripts/serve --model {shlex.quote(f"{run.name}={path}")}
python -m scripts.sample {sample}
```

The quality of the images was not measured. To measure it, run `python -m scripts.evaluate pictures` with `--data` \
and `--checkpoint`, or for MNIST `python -m scripts.evaluate digits`."""


def _data(run: Run, data: DataSet) -> str:
    lines = "\n".join(f"- {markdown(line)}" for line in lines_about(data))
    facts = run.start.config.training if run.start else {}
    learned = dict.fromkeys(markdown(str(each)) for each in [*earlier_data(facts), facts.get("data")] if each)
    before = f" The weights from which it started had learned from: {'; '.join(learned)}." if learned else ""
    return f"""## Training data

{lines}

The checkpoint stores this description of the data: {markdown(data.description)}.{before} The model can generate \
near copies of these images. Do not publish the model if the images are private or if their licence forbids it."""


def _training(run: Run, num_parameters: int) -> str:
    best = min(run.results, key=lambda result: (math.isnan(result.validation_loss), result.validation_loss))
    curves = f" and `{CURVES}`" if (run.folder / CURVES).exists() else ""
    recipe = "\n".join(describe(run.recipe.model_dump(mode="json", exclude_none=True)))
    start = f" It started with the weights whose SHA-256 is {run.start.weights_sha256}." if run.start else ""
    loss = f"{best.validation_loss:.5f}"
    epochs = "1 epoch" if len(run.results) == 1 else f"{len(run.results)} epochs"
    return f"""## Training

The network has {num_parameters:,} parameters.{start} It was trained for {epochs} with the seed \
{run.seed}. The checkpoint is that of epoch {best.epoch}, which had the lowest validation loss, {loss}. \
The losses of all epochs are in `losses.csv`{curves}. The recipe, from the preset `{run.preset}`:

```text
{recipe}
```
"""
