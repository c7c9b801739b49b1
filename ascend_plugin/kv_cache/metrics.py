"""The plugin's counters on vLLM's ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from .counters import NAMES, read_counters

_HELP = {
    "rows": "Rows written into int8 KV caches; a row is K, or V, of one token and kv head.",
    "saturated": "Rows with a value outside of the calibrated range (c8s and c8p).",
    "patched": "Rows stored with a patch (c8p).",
    "patch_overflows": "Rows that deserved a patch and found its slot taken (c8p).",
}


class KVCacheCollector(Collector):
    """Reads the counters of all workers when it is asked."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield one family per counter, labelled with model and variant."""
        totals = read_counters()
        for column, name in enumerate(NAMES):
            family = CounterMetricFamily(
                f"ascend_plugin:kv_cache_{name}", _HELP[name], labels=("model_name", "variant")
            )
            for labels, counts in totals.items():
                family.add_metric(labels, counts[column])
            yield family


_collector = KVCacheCollector()


def register_collector(registry: CollectorRegistry = REGISTRY) -> None:
    """Add the counters to a registry. Idempotent."""
    if _collector not in registry._collector_to_names:
        registry.register(_collector)
