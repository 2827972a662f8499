"""How much memory and time `loramill results` takes for a million rows: prints seconds, rows/s and peak RSS.

Not a test. Run as `python -m tests.producer.measure_results [ROWS]` in the repository root.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from loramill.schemas.job import JobNames, JobSpec
from loramill.store.packing import Chunk
from loramill.store.records import DoneRow, NewShard
from loramill.store.sqlite_store import SqliteStore
from tests.producer.queued import Queue, done_row, line_of

SHARD_ROWS = 512


def build(folder: Path, rows: int) -> str:
    """A completed job whose rows were planned in some other order than they came; one in 100 failed."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    queue = Queue(folder, tokenizer)
    queue.store.stage(JobSpec(id="job", base_id=queue.manifest.base_id, names=JobNames(base="tiny")))
    order = np.random.default_rng(0).permutation(rows)
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        mine = [(int(row), line_of(int(row))) for row in order[start : start + SHARD_ROWS]]
        queue.store.add_shard("job", NewShard(number, mine))
    queue.store.accept("job")
    while claim := queue.claim():
        lines = queue.store.read_shard("job", claim.lease.shard)
        done: list[DoneRow] = [done_row("job", *line, fail={f"r{line[0] // 100 * 100}"}) for line in lines]
        queue.store.commit(claim.lease, Chunk.of(done, range(len(done))))
    queue.store.close()
    return queue.url


def collect(url: str, output: Path) -> None:
    """In this process, which has done nothing else."""
    from loramill.producer.results import ResultsOptions, results

    with SqliteStore(url.removeprefix("sqlite:///"), create=False):
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.monotonic()
    results(ResultsOptions(store=url, job_id="job", output=output))
    seconds = time.monotonic() - started_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = {
        "seconds": round(seconds, 1),
        "imports_mib": before_kib // 1024,
        "above_mib": (peak_kib - before_kib) // 1024,
    }
    print(json.dumps(said))


def main() -> None:
    """Builds the job, then reads it in a process of its own."""
    if sys.argv[1:2] == ["collect"]:
        collect(sys.argv[2], Path(sys.argv[3]))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        url, output = build(Path(folder), rows), Path(folder) / "out.jsonl"
        subprocess.run(
            [sys.executable, "-m", "tests.producer.measure_results", "collect", url, str(output)], check=True
        )
        print(f"{output.stat().st_size / 2**20:,.0f} MiB of output")


if __name__ == "__main__":
    main()
