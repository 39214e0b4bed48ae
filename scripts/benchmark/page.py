"""Makes a page of tables from the results of one machine.

The pictures of the page docs/benchmarks/xeon.md are in the folder docs/benchmarks/xeon. Each has the name of its JSON
file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.files import write_atomically
from scripts.benchmark.profile import profile_table
from scripts.benchmark.report import COLUMNS, Table, table_of, without_empty
from scripts.benchmark.training import TRAINING_COLUMNS, training_table
from scripts.benchmark.versions import COLUMNS as VERSION_COLUMNS
from scripts.benchmark.versions import versions_table
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

MACHINE = ("processor", "cores", "features", "gpu", "torch", "threads")  # what must be the same for a page


def write_page(folder: Path, out: Path, reporter: Reporter) -> None:
    """Writes the page of the results in a folder."""
    write_atomically(out, page_of(folder, out).encode())
    reporter.line(f"wrote {out}")


def page_of(folder: Path, page: Path) -> str:
    """Returns the text of the page: the machine, then the table and the picture of each file.

    `page` is where the text will be written. Raises ScriptError if the files are not results of one machine.
    """
    contents = {file.stem: _read(file) for file in sorted(folder.glob("*.json")) if ".answers" not in file.name}
    machines = [{name: content["machine"].get(name) for name in MACHINE} for content in contents.values()]
    if not machines or any(machine != machines[0] for machine in machines):
        raise ScriptError(f"{folder} must hold results, and those of one machine")
    sections = [f"# Measured on {page.stem}", _machine_line(machines[0])]
    for name, content in contents.items():
        sections += [f"## {name}", *_how(content), as_table(*table_in(content)).rstrip()]
        if (page.with_suffix("") / f"{name}.png").exists():
            sections.append(f"![{name}]({page.stem}/{name}.png)")
    return "\n\n".join(sections) + "\n"


def table_in(content: Mapping[str, Any]) -> Table:
    """What was printed when it was measured."""
    if "milliseconds" in content:
        return profile_table(content)
    if "limit" in content:
        return TRAINING_COLUMNS, training_table(content["images_a_second"], content["limit"])
    if "seconds_in_a_pair" in content:
        return VERSION_COLUMNS, versions_table(content["rows"])
    return without_empty(COLUMNS, table_of(content["rows"]))


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        table_in(content)
        _machine_line(content["machine"])
        _how(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ScriptError(f"{file} is no finished run with a table") from error
    return content


def _machine_line(machine: Mapping[str, Any]) -> str:
    gpu = machine["gpu"] or "no GPU"
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])}), {gpu}, "
        f"torch {machine['torch']}, {machine['threads']} compute threads."
    )


def _how(content: Mapping[str, Any]) -> list[str]:
    """The window of a load, and the rate that its shares are of."""
    if "seconds" not in content:
        return []
    seconds, rate = content["seconds"], content["machine"]["matrix_rate"]
    return [
        f"Windows of {seconds['window']} s, {seconds['settle']} s under load before; in time: within "
        f"{seconds['objective']:g} s; matrix rate: {rate / 1e9:.0f} GFLOP/s."
    ]
