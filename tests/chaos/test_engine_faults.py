"""What happens to engines: they die, hang, run out of memory, on their own or because of a row."""

import signal

from tests.chaos.cluster import LEASE_S, Cluster, times_computed
from tests.chaos.processes import is_alive
from tests.chaos.rows import rows_of

SLOW = {"STUB_STEP_S": "0.05", "STUB_SEQS": "8"}
HANG = {"LORAMILL_HANG_TIMEOUT": "2s"}


def test_an_engine_that_dies_costs_its_rows_one_more_run_and_its_worker_nothing(cluster: Cluster) -> None:
    rows = rows_of(160)
    worker = cluster.worker(**SLOW)
    cluster.ready(worker)
    node, engine = worker.pids() or (0, 0)
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
    committed = cluster.committed(job)
    worker.send(signal.SIGABRT, engine)
    cluster.until("another engine", lambda: worker.pids() not in (None, (node, engine)))
    cluster.finish(job, rows)
    assert worker.node() == node
    assert not is_alive(engine)
    ran = times_computed(cluster)
    assert all(ran[row] == 1 for row in committed)
    # Without blame: no lease was lost, no row charged.
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))


def test_an_engine_that_hangs_is_killed_and_its_rows_run_again(cluster: Cluster) -> None:
    rows = rows_of(160)
    worker = cluster.worker(**SLOW, **HANG)
    cluster.ready(worker)
    node, engine = worker.pids() or (0, 0)
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
    worker.send(signal.SIGSTOP, engine)
    cluster.finish(job, rows)
    assert worker.node() == node
    assert not is_alive(engine)
    assert worker.said("is killed") == 1


def test_the_shards_of_an_engine_that_hangs_go_to_another_worker(cluster: Cluster) -> None:
    rows = rows_of(160)
    worker = cluster.worker(**SLOW)
    other = cluster.standby()
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
    worker.send(signal.SIGSTOP, worker.engine())
    # Long before the worker gives its engine up (300 s): a lease is only renewed while the engine steps.
    other.go_on()
    cluster.finish(job, rows)
    # Given back before the leases ran out, and no others taken meanwhile.
    assert worker.said("given back: the engine does not step")
    assert {shard.attempts for shard in cluster.store.shards(job)} <= {0, 1}


def test_a_row_that_makes_engines_hang_does_not_go_from_worker_to_worker_for_ever(cluster: Cluster) -> None:
    rows = rows_of(160, special={23: "HANG"}, failing={23: "engine_crash"})
    # As in a cluster, an engine is given up long after its leases have run out.
    workers = [cluster.worker(LORAMILL_HANG_TIMEOUT=f"{1.25 * LEASE_S}s", STUB_SEQS="8") for _ in range(2)]
    cluster.ready()
    job = cluster.submit(rows)
    cluster.finish(job, rows)
    assert sum(worker.said("died 3 times while the row") for worker in workers) == 1


def test_poison_rows_fail_alone_and_their_siblings_are_answered(cluster: Cluster) -> None:
    poison = {7: "ABORT", 22: "ABORT"}  # of one shard
    rows = rows_of(160, special=poison, failing=dict.fromkeys(poison, "engine_crash"))
    worker = cluster.worker(STUB_SEQS="8")
    cluster.ready(worker)
    node = worker.node()
    job = cluster.submit(rows)
    cluster.finish(job, rows)
    assert worker.node() == node
    # Three lone crashes each, and those in company that made them suspects.
    assert 3 * len(poison) < worker.said("died (signal 6)") <= 5 * len(poison)
    assert worker.said("died 3 times while the row") == len(poison)


def test_out_of_memory_halves_the_batch_and_charges_no_attempt(cluster: Cluster) -> None:
    # OOM: in company; OOM1: always, and then the row's own.
    rows = rows_of(100, special={5: "OOM", 6: "OOM", 70: "OOM1"}, failing={70: "out_of_memory"})
    worker = cluster.worker()
    cluster.ready(worker)
    engine = worker.engine()
    job = cluster.submit(rows)
    cluster.finish(job, rows)
    assert worker.engine() == engine
    assert all(shard.attempts == 0 and not shard.suspects for shard in cluster.store.shards(job))
