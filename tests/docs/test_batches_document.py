"""The figures of batches in docs/benchmarks.md."""

import json

from scripts.benchmark.batches import COLUMNS, table_of
from scripts.benchmark.report import percentile, with_spread
from scripts.evaluation.tables import as_table
from tests.docs.markdown import ROOT

ROWS = json.loads((ROOT / "docs/results/batches.json").read_text())["rows"]


def test_benchmarks_have_the_measured_table_of_batches() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert as_table(COLUMNS, table_of(ROWS)).strip() in text
    assert f"A batch alone has {with_spread([row['alone'] for row in ROWS])} times" in text


def test_batch_hardly_delays_requests_and_uses_what_they_leave() -> None:
    for client in ROWS[0]["clients"]:
        found = [row["clients"][client] for row in ROWS]
        alone, with_batch = (
            percentile([latency for each in found for latency in each[name]], 0.95) for name in ("alone", "with_batch")
        )
        assert with_batch <= 1.3 * alone
        assert _median([each["share"] for each in found]) >= 0.9
    assert _median([row["alone"] for row in ROWS]) >= 0.97


def _median(values: list[float]) -> float:
    return percentile(values, 0.5)
