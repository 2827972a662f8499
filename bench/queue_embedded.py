"""`python -m bench.queue_embedded ROWS JOURNAL`: rows by the runner and the stub engine into a journal, in one process.

Prints what it took, as JSON. Of `python -m bench.queue`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from loramill.schemas.names import Named, Names
from loramill.store.journal import Journal
from loramill.worker.settings import ModelOptions
from loramill.worker.shard_runner import Job, Shard, ShardRunner
from tests import stub_engine


def main(rows: Path, path: Path) -> None:
    journal = Journal(path, {"input": str(rows)})
    served = stub_engine.open_stub(ModelOptions(base_model=stub_engine.BASE))
    manifest = served.manifest
    names = Names(manifest.base, {one.name: Named(one.sha256) for one in manifest.adapters})
    runner = ShardRunner(served.engine, served.prompter)
    before, started_s = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    job = Job("embedded", names, {}, manifest.max_model_len)
    runner.submit(Shard(job, _lines(rows), journal.commit))
    while runner.has_work:
        runner.step()
    after, wall_s = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - started_s
    done = journal.totals()
    assert not done.failed
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"rows": done.done, "wall_s": wall_s, "cpu_s": cpu_s, "rows_per_s": done.done / wall_s}))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            yield number, line.rstrip(b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
