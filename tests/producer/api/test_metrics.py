"""`/metrics` as Prometheus' own parser reads it, held against what a worker did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from loramill.producer.api.context import Caller
from loramill.schemas.job import JobNames, JobSpec, Pinned
from loramill.store.contract import JobStore
from loramill.store.errors import StoreUnreachable
from loramill.store.records import NewShard
from loramill.worker.node import Node
from tests.producer.api.asking import asking
from tests.stub_engine import manifest
from tests.worker.queueing import staged, until

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
HERE = frozenset({("worker", "here")})
STEPS = ("loramill_engine_step_seconds_count", HERE)
OPERATIONS = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


def scrape(client: TestClient) -> Series:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def at(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def submit(store: JobStore, job: str, adapter: str, rows: int, *, bad: int = 0) -> None:
    [offer] = [one for one in manifest()[0].adapters if one.name == adapter]
    names = JobNames(base="stub", adapters={adapter: Pinned(key=offer.key)})
    store.stage(JobSpec(id=job, base_id=manifest()[0].base_id, names=names))
    lines = [{"id": f"r{at}", "adapter": adapter, "prompt": "OOM1" if at < bad else "row"} for at in range(rows)]
    store.add_shard(job, NewShard(0, [(at, orjson.dumps(line)) for at, line in enumerate(lines)], (offer.key,)))
    store.accept(job)


def test_what_a_worker_did_is_what_is_read_and_no_counter_falls_when_its_engine_dies(
    store: JobStore, worker: Node
) -> None:
    with asking(store) as [client]:
        submit(store, "j1", "a01", 20)
        submit(store, "j2", "a02", 3, bad=1)
        staged(store, "j3", ["row"] * 5)
        until(lambda: all(store.job(job).status.ended for job in ("j1", "j2", "j3")))
        until(lambda: scrape(client).get(("loramill_engine_batch_rows_total", HERE), 0) >= 28)
        series = scrape(client)
        rows = {"worker": "here", "outcome": "completed"}
        assert at(series, "loramill_rows_total", adapter="a01", **rows) == 20
        assert at(series, "loramill_rows_total", adapter="a02", **rows) == 2
        assert at(series, "loramill_rows_total", adapter="a02", worker="here", outcome="failed") == 1
        assert at(series, "loramill_rows_total", adapter="(base)", **rows) == 5
        job = store.job("j1")
        tokens = {"worker": "here", "adapter": "a01"}
        assert at(series, "loramill_tokens_total", kind="prompt", **tokens) == job.prompt_tokens
        assert at(series, "loramill_tokens_total", kind="completion", **tokens) == job.completion_tokens
        assert at(series, "loramill_store_up") == 1
        assert at(series, "loramill_workers", state="ready") == 1
        assert at(series, "loramill_store_used_bytes") == store.info().used_bytes > 0
        assert at(series, "loramill_pending_rows") == at(series, "loramill_lease_expiries_total") == 0
        assert at(series, "loramill_engine_adapter_loads_total", worker="here") == 2
        assert at(series, "loramill_engine_resident_adapters", worker="here") == 2
        assert at(series, "loramill_engine_kv_capacity_tokens", worker="here") > 0
        assert at(series, "loramill_engine_batch_rows_total", worker="here") >= 28

        worker.engines[0].kill()
        until(lambda: at(scrape(client), "loramill_engine_restarts_total", worker="here") == 1)
        after = scrape(client)
        assert {key for key in counters(series) if after[key] < series[key]} == set()
        submit(store, "j4", "a01", 20)
        until(lambda: at(scrape(client), "loramill_rows_total", adapter="a01", **rows) == 40)
        until(lambda: scrape(client)[STEPS] > series[STEPS])
        later = scrape(client)
        assert {key for key in counters(series) if later[key] < after[key]} == set()


def counters(series: Series) -> list[Any]:
    return [key for key in series if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]


def test_the_step_histogram_is_one(store: JobStore, worker: Node) -> None:
    staged(store, "j", ["SLOW"] * 2)
    with asking(store) as [client]:
        until(lambda: store.job("j").status.ended)
        until(lambda: scrape(client)[STEPS] >= 60)
        series = scrape(client)
    name = "loramill_engine_step_seconds_bucket"
    buckets = sorted((float(dict(labels)["le"]), value) for (key, labels), value in series.items() if key == name)
    values = [value for _, value in buckets]
    assert values == sorted(values)
    assert buckets[-1] == (float("inf"), series[STEPS])
    # A pass that finishes nothing takes 0.05 s.
    assert dict(buckets)[10.0] - dict(buckets)[0.025] >= 59
    assert at(series, "loramill_engine_step_seconds_sum", worker="here") >= 59 * 0.05


def test_what_waits_is_seen_by_base(store: JobStore) -> None:
    store.publish(manifest()[0])
    staged(store, "j", ["row"] * 20, per_shard=8)
    with asking(store) as [client]:
        series = scrape(client)
    base = {"base": "stub", "base_id": manifest()[0].base_id}
    assert at(series, "loramill_queue_shards", **base) == 3
    assert at(series, "loramill_queue_rows", **base) == at(series, "loramill_pending_rows") == 20
    assert 0 <= at(series, "loramill_queue_oldest_age_seconds", **base) < 60


def test_requests_are_counted_by_route_and_not_by_what_is_asked_for(store: JobStore) -> None:
    with asking(store) as [client]:
        for number in range(5):
            client.get(f"/v1/adapters/none-{number}")
            client.get(f"/nowhere/{number}")
        client.get("/v1/adapters")
        client.request("BREW", "/v1/adapters")
        client.put("/v1/adapters")
        series = scrape(client)
    found = {"route": "/v1/adapters/{name}", "method": "GET"}
    assert at(series, "loramill_http_requests_total", status="404", **found) == 5
    assert at(series, "loramill_http_request_duration_seconds_count", **found) == 5
    assert at(series, "loramill_http_requests_total", route="unmatched", method="GET", status="404") == 5
    assert at(series, "loramill_http_requests_total", route="/v1/adapters", method="GET", status="200") == 1
    assert at(series, "loramill_http_requests_total", route="/v1/adapters", method="other", status="405") == 1
    assert at(series, "loramill_http_requests_total", route="/v1/adapters", method="PUT", status="405") == 1


def test_a_store_that_is_away_is_said(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise StoreUnreachable("gone")

    monkeypatch.setattr(store, "info", away)
    with asking(store) as [client]:
        client.get("/nowhere")
        series = scrape(client)
    assert at(series, "loramill_store_up") == 0
    assert at(series, "loramill_http_requests_total", route="unmatched", method="GET", status="404") == 1


def test_operators_alone(store: JobStore) -> None:
    with asking(store, Caller("lab", operator=False)) as [client]:
        assert client.get("/metrics").status_code == 403


def test_every_name_is_documented_and_no_other(store: JobStore, worker: Node) -> None:
    with asking(store) as [client]:
        until(lambda: any(name == "loramill_engine_places" for name, _ in scrape(client)))
        families = text_string_to_metric_families(client.get("/metrics").text)
        said = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    table = OPERATIONS.partition("### Metrics")[2].partition("\n## ")[0]
    names = [cell for row in table.splitlines() if row.startswith("| `") for cell in row.split("|")[1].split(", ")]
    assert {name.strip("` ").partition("{")[0] for name in names} == {one for one in said if "_created" not in one}
