"""What happens when the disk of part files is full: nothing half is seen, nothing is lost, and it goes on with room."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.store.errors import JobNotFound, StoreFull
from tests.chaos.cluster import SHORT_TIMES, Cluster, rows_of
from tests.chaos.hooks import Chaos

SLOW = {"STUB_STEP_S": "0.1", "STUB_SEQS": "8"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here: the test with a limit on the size of files covers it")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_stops_the_job_until_there_is_room(cluster: Cluster, small_disk: Path) -> None:
    cluster.files = f"file://{small_disk}/files"
    rows = rows_of(240)
    worker = cluster.worker(**SLOW)
    cluster.ready()
    job = cluster.submit(rows)
    cluster.until("some rows finished", lambda: cluster.finished(job) >= 16)
    _fill(small_disk / "ballast")
    time.sleep(1)
    before = cluster.finished(job)
    assert before < len(rows.lines)
    visible = _part_files(small_disk)
    # A submit is refused as a whole.
    with pytest.raises(StoreFull):
        cluster.submit(rows, id="refused")
    with pytest.raises(JobNotFound):
        cluster.store.job("refused")
    assert not (small_disk / "files" / "refused").exists() or not _part_files(small_disk / "files" / "refused")
    time.sleep(1.5)
    assert (cluster.finished(job), _part_files(small_disk)) == (before, visible)
    (small_disk / "ballast").unlink()
    cluster.finish(job, rows)
    assert worker.code is None
    assert worker.said("waiting for the store")
    # The leases were kept meanwhile.
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))


def test_a_worker_that_cannot_write_its_results_leaves_them_to_others(cluster: Cluster) -> None:
    cluster.files = f"file://{cluster.folder}/files"
    # Its log stays below the limit; eight answers of 2000 random digits do not.
    rows = rows_of(80, special={number: random.Random(number).randbytes(1000).hex() for number in range(80)})
    # It gives a shard back when its disk has been full for a while.
    times = {**SHORT_TIMES, "loramill.worker.shard_run:DISK_FULL_S": 0.3}
    poor = cluster.worker(chaos=Chaos(times=times, file_bytes=6000), **SLOW)
    cluster.ready()
    job = cluster.submit(rows)
    cluster.until("a shard given back", lambda: poor.said("given back"))
    assert cluster.finished(job) == 0
    assert not _part_files(cluster.folder / "files")
    assert all(shard.attempts == 0 for shard in cluster.store.shards(job))
    cluster.worker()
    cluster.finish(job, rows)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(os.urandom(size) if size > 1 else b"x")
            except OSError:
                continue


def _part_files(folder: Path) -> list[str]:
    """Of results, as readers would see them."""
    return sorted(path.name for path in folder.rglob("part-*.zst"))
