from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from app.ray.metrics import merged


def registry(amount: float) -> CollectorRegistry:
    own = CollectorRegistry()
    Counter("unfog_images", "Images.", ["model"], registry=own).labels("a").inc(amount)
    Histogram("unfog_seconds", "Seconds.", buckets=(1, 2), registry=own).observe(amount)
    return own


def test_samples_of_all_replicas_have_the_name_of_their_replica() -> None:
    text = merged({"x": registry(1).collect(), "y": registry(2).collect()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        sample.labels["replica"]: (sample.labels["model"], sample.value)
        for sample in families["unfog_images"].samples
        if sample.name == "unfog_images_total"
    }
    assert counts == {"x": ("a", 1.0), "y": ("a", 2.0)}
    buckets = {
        (sample.labels["replica"], sample.labels["le"]): sample.value
        for sample in families["unfog_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert buckets == {("x", "1.0"): 1, ("x", "2.0"): 1, ("x", "+Inf"): 1} | {
        ("y", "1.0"): 0,
        ("y", "2.0"): 1,
        ("y", "+Inf"): 1,
    }


def test_each_metric_is_described_once() -> None:
    text = merged({"x": registry(1).collect(), "y": registry(2).collect()}).decode()
    assert text.count("# TYPE unfog_images_total counter") == 1
    assert text.count("# HELP unfog_seconds Seconds.") == 1


def test_without_replicas_there_are_no_metrics() -> None:
    assert merged({}) == b""
