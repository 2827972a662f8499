"""What happens to the Redis server, and to the tickets in it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramill.schemas.job import JobStatus
from loramill.store.errors import JobNotFound, StoreFull, StoreLost
from loramill.worker.tickets import make_app, queue_of, top_up
from tests.chaos.cluster import Cluster, times_computed
from tests.chaos.rows import BASE, rows_of
from tests.servers import RedisServer

SLOW = {"STUB_STEP_S": "0.1", "STUB_SEQS": "8"}
StartServer = Callable[..., RedisServer]


def test_redis_that_is_killed_comes_back_from_its_log_and_the_job_goes_on_by_itself(
    tmp_path: Path, server: StartServer
) -> None:
    redis = server()
    with Cluster(tmp_path, redis.url) as cluster:
        rows = rows_of(200)
        workers = [cluster.worker(**SLOW), cluster.worker(**SLOW)]
        cluster.ready()
        nodes = [worker.node() for worker in workers]
        job = cluster.submit(rows)
        cluster.until("some rows finished", lambda: cluster.finished(job) >= 16)
        redis.kill()
        time.sleep(1)
        redis.start()
        # At most the last second is lost, and what is lost runs again.
        cluster.finish(job, rows)
        assert [worker.node() for worker in workers] == nodes
        assert max(times_computed(cluster).values()) <= 2


def test_redis_that_forgets_is_a_loud_error_for_everybody(tmp_path: Path, server: StartServer) -> None:
    redis = server(appendonly="no")
    with Cluster(tmp_path, f"{redis.url}?volatile=1") as cluster:
        rows = rows_of(200)
        worker = cluster.worker(**SLOW)
        cluster.ready()
        job = cluster.submit(rows)
        cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
        redis.kill()
        redis.start()
        with pytest.raises(StoreLost):
            cluster.store.jobs()
        assert worker.wait(20) == 1
        assert worker.said("is not the store that it was")
        about = ("status", "watch", "cancel", "retry", "wait")
        commands = [["list"], ["results", job, "-o", "x.jsonl"], *([name, job] for name in about)]
        with ThreadPoolExecutor(len(commands)) as pool:
            ended = list(pool.map(lambda given: cluster.command(*given), commands))
        for command, (code, out, err) in zip(commands, ended, strict=True):
            assert (code, out) == (1, ""), (command, err)
            assert "lost its data" in err
        assert not (tmp_path / "x.jsonl").exists()


def test_connections_that_flap_change_nothing(cluster: Cluster, redis_server: RedisServer) -> None:
    rows = rows_of(240)
    workers = [cluster.worker(**SLOW), cluster.worker(**SLOW)]
    cluster.ready()
    job = cluster.submit(rows)
    killed = 0
    for finished in range(1, 6):
        cluster.until("more rows finished", lambda finished=finished: cluster.finished(job) >= 16 * finished)
        # How many there are depends on who has come back from the last time.
        killed += redis_server.cli("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert killed > 10
    cluster.finish(job, rows)
    assert all(worker.code is None for worker in workers)
    # They take shards of the next job, unaided.
    cluster.finish(cluster.submit(rows), rows)


def test_lost_tickets_are_issued_again(cluster: Cluster, redis_server: RedisServer) -> None:
    rows = rows_of(160)
    cluster.worker()
    cluster.ready()
    ended = threading.Event()

    def lose() -> None:
        with redis_server.client() as client:
            while not ended.wait(0.002):
                client.delete(_queue(cluster))

    losing = threading.Thread(target=lose)
    losing.start()
    job = cluster.submit(rows)
    time.sleep(3)
    ended.set()
    losing.join()
    cluster.finish(job, rows)


def test_doubled_tickets_claim_nothing(cluster: Cluster, redis_server: RedisServer) -> None:
    rows = rows_of(160)
    workers = [cluster.worker(**SLOW), cluster.worker(**SLOW)]
    cluster.ready()
    for worker in workers:
        worker.stop()  # so that tickets lie there to be copied, but for those that were asked for already
    job = cluster.submit(rows)
    app = make_app(redis_server.url, prefix=cluster.prefix)
    top_up(app, BASE, ready=8)
    with redis_server.client() as client:
        tickets = client.lrange(_queue(cluster), 0, -1)
        assert tickets
        client.lpush(_queue(cluster), *tickets * 50)
    for worker in workers:
        worker.go_on()
    cluster.finish(job, rows)
    cluster.until("all tickets used up", lambda: not redis_server.cli("LLEN", _queue(cluster)))
    assert set(times_computed(cluster).values()) == {1}
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))


def test_redis_without_memory_refuses_submits_whole_and_lets_running_jobs_wait(
    tmp_path: Path, server: StartServer
) -> None:
    redis = server()
    with Cluster(tmp_path, redis.url) as cluster:
        rows = rows_of(200)
        worker = cluster.worker(**SLOW)
        cluster.ready()
        job = cluster.submit(rows)
        cluster.until("some rows finished", lambda: cluster.finished(job) >= 8)
        redis.cli("CONFIG", "SET", "maxmemory", "1mb")  # it has more already
        time.sleep(0.5)
        before = cluster.finished(job)
        keys = redis.cli("DBSIZE")
        with pytest.raises(StoreFull):
            cluster.submit(rows, id="refused")
        with pytest.raises(JobNotFound):
            cluster.store.job("refused")
        code, _, err = cluster.command("submit", str(cluster.write(rows)), "--id", "refused")
        assert code == 1
        assert "takes nothing more" in err
        assert redis.cli("DBSIZE") <= keys
        assert cluster.finished(job) == before
        assert cluster.store.job(job).status is JobStatus.IN_PROGRESS
        redis.cli("CONFIG", "SET", "maxmemory", "0")
        cluster.finish(job, rows)
        assert worker.code is None
        # The leases were kept meanwhile, so nothing ran again.
        assert all(shard.attempts == 0 for shard in cluster.store.shards(job))


def _queue(cluster: Cluster) -> str:
    return f"{cluster.prefix}:tickets:{queue_of(BASE)}"
