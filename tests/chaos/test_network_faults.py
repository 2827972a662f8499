"""What happens between a worker and its store: partitions shorter and longer than a lease, and connections that nobody
closes. With a lease of 2 s, 5 and 40 and 90 s of partition are 0.3 and 2.7 and 6 s."""

import time
from collections.abc import Iterator

import pytest

from tests.chaos.cluster import LEASE_S, Cluster, Form, Worker, rows_of, times_computed
from tests.chaos.proxy import Proxy
from tests.servers import RedisServer

SLOW = {"STUB_STEP_S": "0.1", "STUB_SEQS": "8"}
SHORT_S, LONG_S, LONGER_S = (seconds * LEASE_S / 30 for seconds in (5, 40, 90))


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as made:
        yield made


def _behind(cluster: Cluster, proxy: Proxy, form: Form = "celery", **environment: str) -> Worker:
    worker = cluster.worker(form=form, url=f"redis://127.0.0.1:{proxy.port}/0", **SLOW, **environment)
    cluster.ready(worker)
    return worker


def test_a_short_partition_costs_nothing(cluster: Cluster, proxy: Proxy) -> None:
    rows = rows_of(240)
    _behind(cluster, proxy)
    job = cluster.submit(rows)
    for finished in (16, 48, 80):
        cluster.until("more rows finished", lambda finished=finished: cluster.finished(job) >= finished)
        proxy.partition()
        time.sleep(SHORT_S)
        proxy.heal()
    cluster.finish(job, rows)
    assert set(times_computed(cluster).values()) == {1}
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))


def test_who_was_cut_off_beyond_its_lease_goes_on_if_nobody_else_has_the_shard(cluster: Cluster, proxy: Proxy) -> None:
    rows = rows_of(320)
    worker = _behind(cluster, proxy)
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 16)
    proxy.partition()
    time.sleep(0.3)
    before, computed = cluster.finished(job), times_computed(cluster).total()
    time.sleep(LONG_S)
    # The engine goes on meanwhile, as far as its shards do.
    assert times_computed(cluster).total() > computed + 16
    assert cluster.finished(job) == before
    proxy.heal()
    cluster.finish(job, rows)
    assert worker.said("nobody else had it: going on")
    assert set(times_computed(cluster).values()) == {1}


def test_who_was_cut_off_while_another_went_on_commits_nothing_more(cluster: Cluster, proxy: Proxy) -> None:
    rows = rows_of(240)
    cut_off = _behind(cluster, proxy)
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 16)
    committed = cluster.committed(job)
    proxy.partition()
    other = cluster.worker()
    time.sleep(LONGER_S)
    cluster.wait(job)
    before = cluster.store.job(job)
    proxy.heal()
    cluster.until("the shards given up", lambda: cut_off.said("lost to another worker"))
    assert cluster.store.job(job) == before
    # What was on its way when the network was cut came late, and was refused.
    assert cluster.finish(job, rows).committed_twice == 0
    ran = times_computed(cluster)
    assert max(ran.values()) <= 2
    assert all(ran[row] == 1 for row in committed)
    other.end()
    cluster.finish(cluster.submit(rows), rows)


@pytest.mark.parametrize("lose", [False, True], ids=["reset", "forgotten"])
def test_a_worker_whose_connections_are_gone_makes_new_ones(cluster: Cluster, proxy: Proxy, lose: bool) -> None:
    rows = rows_of(240)
    worker = _behind(cluster, proxy, "command", LORAMILL_WATCHDOG="3s")
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 16)
    if lose:
        proxy.partition(lose=True)  # they stay open, mute for ever: only a time limit finds out
        proxy.heal()
    else:
        proxy.reset()
    cluster.finish(job, rows)
    # Tickets come by a connection of their own. Celery may wait at a mute one for ever; the worker starts it again.
    cluster.finish(cluster.submit(rows), rows)
    assert worker.code is None
