"""The same workers on a SQLite file: no server, no tickets."""

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import SHORT_TIMES, Cluster, rows_of, times_computed
from tests.chaos.hooks import Chaos, Point

SLOW = {"STUB_STEP_S": "0.05", "STUB_SEQS": "8"}


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.db") as made:
        yield made


def test_a_worker_that_is_killed_amid_a_commit_loses_nothing(embedded: Cluster) -> None:
    rows = rows_of(200)
    chaos = Chaos(times=SHORT_TIMES, at=Point.AFTER_COMMIT, once=str(embedded.folder / "once"))
    victim = embedded.worker(form="command", chaos=chaos, **SLOW)
    other = embedded.worker(form="command", **SLOW)
    embedded.ready()
    job = embedded.submit(rows)
    assert victim.wait(30) == -signal.SIGKILL
    assert embedded.finish(job, rows).committed_twice == 0
    assert max(times_computed(embedded).values()) <= 2
    code, took_s = other.term()
    assert code == 0
    assert took_s < 10
