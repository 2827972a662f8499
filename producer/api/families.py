"""What the store and its workers say of themselves, as Prometheus' metric families.

Counters of workers carry the worker's id and begin again with it, as Prometheus expects; over the lives of its engines
they go on. A worker that has ended is gone from here, so sum up rates, not counters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from loramill.store.contract import JobStore
from loramill.store.errors import StoreError
from loramill.store.records import Backlog, StoreInfo, WorkerRecord

STATES = ("loading", "ready", "draining")
# Name, what it is, and where it is in the engine's statistics.
ENGINE_COUNTERS = (
    ("prompt_tokens", "Prompt tokens computed.", ("prompt_tokens",)),
    ("prompt_tokens_shared", "Prompt tokens that another row had computed.", ("prompt_tokens_shared",)),
    ("completion_tokens", "Tokens generated.", ("completion_tokens",)),
    ("batch_rows", "Sequences in passes, summed up over passes.", ("batch_rows",)),
    ("batch_places", "Places for sequences in passes, summed up over passes.", ("batch_places",)),
    ("preemptions", "Sequences that gave way to others and start over.", ("preemptions",)),
    ("out_of_memory", "Passes that ran out of memory and were made again, smaller.", ("out_of_memory",)),
    ("adapter_loads", "Adapters put into device slots.", ("adapter_loads",)),
    ("adapter_evictions", "Adapters that made room for others in device slots.", ("adapter_evictions",)),
    ("adapter_load_seconds", "Time that passes waited for adapters.", ("adapter_load_s",)),
    ("adapter_merges", "Times that adapters were merged into the base's weights.", ("merges",)),
    ("adapter_host_hits", "Adapters that were in host memory when a slot needed them.", ("host", "hits")),
    ("adapter_host_loads", "Adapters read from disk into host memory.", ("host", "loads")),
    ("adapter_host_evictions", "Adapters dropped from host memory.", ("host", "evictions")),
)
ENGINE_GAUGES = (
    ("running_sequences", "Sequences that run now.", "running"),
    ("places", "Sequences that can run at once.", "places"),
    ("resident_adapters", "Adapters in device slots.", "resident"),
    ("kv_used_tokens", "Tokens of the key-value cache in pages that sequences have.", "kv_used"),
    ("kv_capacity_tokens", "Tokens of the key-value cache.", "kv_tokens"),
)


def families(store: JobStore) -> Iterator[Metric]:
    """All of them; of a store that does not answer, that alone."""
    up = GaugeMetricFamily("loramill_store_up", "Whether the store answers.")
    try:
        info, backlog, workers = store.info(), store.backlog(), store.workers()
        bases = {manifest.base_id: manifest.base for manifest in store.manifests()} if backlog else {}
    except StoreError:
        up.add_metric([], 0)
        yield up
        return
    up.add_metric([], 1)
    yield up
    yield from _of_store(info)
    yield from _of_queue(backlog, bases, time.time() * 1000)
    yield from _of_workers(workers)


def _of_store(info: StoreInfo) -> Iterator[Metric]:
    yield GaugeMetricFamily("loramill_store_used_bytes", "What the store takes.", value=info.used_bytes)
    if info.limit_bytes is not None:
        yield GaugeMetricFamily("loramill_store_limit_bytes", "What it may take.", value=info.limit_bytes)
    yield GaugeMetricFamily("loramill_pending_rows", "Rows of accepted jobs without a result.", value=info.pending_rows)
    yield CounterMetricFamily(
        "loramill_lease_expiries", "Leases on shards taken back because they had run out.", value=info.leases_expired
    )


def _of_queue(backlog: Mapping[str, Backlog], bases: Mapping[str, str], now_ms: float) -> Iterator[Metric]:
    """By a base's name and id: one name can stand for several, after the model changed."""
    labels = ["base", "base_id"]
    shards = GaugeMetricFamily("loramill_queue_shards", "Shards that wait to be claimed.", labels=labels)
    rows = GaugeMetricFamily("loramill_queue_rows", "Rows without a result in such shards.", labels=labels)
    age = GaugeMetricFamily("loramill_queue_oldest_age_seconds", "Since their oldest job was accepted.", labels=labels)
    for base_id, waiting in backlog.items():
        of = [bases.get(base_id, ""), base_id]
        shards.add_metric(of, waiting.shards)
        rows.add_metric(of, waiting.rows)
        age.add_metric(of, max(0.0, now_ms - waiting.oldest_ms) / 1000)
    yield from (shards, rows, age)


def _of_workers(workers: Sequence[WorkerRecord]) -> Iterator[Metric]:
    states = GaugeMetricFamily("loramill_workers", "Workers that were heard of lately.", labels=["state"])
    counted = Counter(worker.state for worker in workers)
    for state in STATES:
        states.add_metric([state], counted[state])
    yield states
    restarts = CounterMetricFamily("loramill_engine_restarts", "Times that an engine died.", labels=["worker"])
    rows = CounterMetricFamily("loramill_rows", "Rows done.", labels=["worker", "adapter", "outcome"])
    tokens = CounterMetricFamily("loramill_tokens", "Tokens of such rows.", labels=["worker", "adapter", "kind"])
    for worker in workers:
        restarts.add_metric([worker.id], worker.restarts)
        for adapter, done in worker.stats.get("adapters", {}).items():
            for outcome in ("completed", "failed"):
                rows.add_metric([worker.id, adapter, outcome], done[outcome])
            for kind in ("prompt", "completion"):
                tokens.add_metric([worker.id, adapter, kind], done[f"{kind}_tokens"])
    yield from (restarts, rows, tokens)
    yield from _of_engines({worker.id: worker.stats["engine"] for worker in workers if "engine" in worker.stats})


def _of_engines(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    steps = HistogramMetricFamily("loramill_engine_step_seconds", "Forward passes.", labels=["worker"])
    for worker, stats in engines.items():
        steps.add_metric([worker], *_histogram(stats["step_times"]))
    yield steps
    for name, what, path in ENGINE_COUNTERS:
        counter = CounterMetricFamily(f"loramill_engine_{name}", what, labels=["worker"])
        for worker, stats in engines.items():
            counter.add_metric([worker], _at(stats, path))
        yield counter
    for name, what, field in ENGINE_GAUGES:
        gauge = GaugeMetricFamily(f"loramill_engine_{name}", what, labels=["worker"])
        for worker, stats in engines.items():
            gauge.add_metric([worker], stats[field])
        yield gauge


def _histogram(times: Mapping[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Buckets that each hold those before it too, and the sum."""
    bounds = [*(str(float(bound)) for bound in times["bounds_s"]), "+Inf"]
    return list(zip(bounds, accumulate(times["counts"]), strict=True)), times["sum_s"]


def _at(stats: Mapping[str, Any], path: Sequence[str]) -> float:
    found: Any = stats
    for name in path:
        found = found[name]
    return float(found)
