"""Combines the metrics of all replicas, so that Prometheus gets them from any of Ray's proxies."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric, generate_latest

REPLICA = "replica"  # the label


@dataclass(frozen=True, slots=True)
class _Families:
    """What `generate_latest` needs of a registry."""

    families: Iterable[Metric]

    def collect(self) -> Iterator[Metric]:
        yield from self.families


def merged(metrics: Mapping[str, Iterable[Metric]]) -> bytes:
    """Returns the text format of the metrics of all replicas, by the name of the replica.

    Each sample gets the label `replica`. The samples of a metric stand together, as the format requires.
    """
    families: dict[str, Metric] = {}
    for replica, its in metrics.items():
        for metric in its:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [sample._replace(labels={REPLICA: replica, **sample.labels}) for sample in metric.samples]
    return generate_latest(_Families(families.values()))
