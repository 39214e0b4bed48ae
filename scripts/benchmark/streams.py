"""Measures what streams cost: the throughput while every client streams previews, and while the batch is watched.

Two processes of this version have the same load. The clients of one of them stream, or a viewer reads its batch events.
They run in turns, as in versions.py.
"""

from pathlib import Path
from typing import Any

from model.files import write_json
from scripts.benchmark.clients import NUM_PREVIEWS, streaming, watching
from scripts.benchmark.loads import ROWS_OF_ALL, Load, clients_of_one, large
from scripts.benchmark.machine import this_machine
from scripts.benchmark.versions import BASE, COLUMNS, NEW, Connect, compare_versions, version, versions_table
from scripts.common.progress import Reporter
from scripts.evaluation.tables import as_table

CLIENTS = 16  # clients of one image
KINDS: dict[str, Connect] = {f"{NUM_PREVIEWS} previews": streaming, "batch events": watching}


def measure_streams(num_pairs: int, seconds: float, out: Path, reporter: Reporter) -> None:
    """Measures both kinds of streams, writes the results and prints the table. `new` is the service with streams.

    Each service is measured for `seconds` per pair.
    """
    rows = list[dict[str, Any]]()

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        reporter.line(f"{row['load']}, pair {row['pair'] + 1}: {row[NEW] / row[BASE]:.3f}")
        write_json(out, {"machine": this_machine().as_json(), "seconds_in_a_pair": seconds, "rows": rows})

    contestants = version(BASE, Path.cwd()), version(NEW, Path.cwd())
    for kind, connect in KINDS.items():
        loads = {Load(f"{load.name}, {kind}", load.clients): ROWS_OF_ALL for load in (clients_of_one(CLIENTS), large())}
        compare_versions(*contestants, loads, num_pairs, seconds, report, connect)
    reporter.line(as_table(COLUMNS, versions_table(rows)))
