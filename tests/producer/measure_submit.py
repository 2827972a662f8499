"""`measure_submit.py ROWS`: the memory and the time of submitting so many short rows to SQLite, phase by phase."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loramill.producer import submit as submitting
from loramill.producer.ask import Ask
from loramill.producer.reader import open_input
from loramill.producer.served import published
from loramill.store.sqlite_store import SqliteStore
from tests import stub_engine


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Timed:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return real(*given, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started_s

        setattr(owner, name, timed)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "in.jsonl").open("w") as file:
            for at in range(count):
                row = {"id": f"r{at}", "adapter": f"a{at % 16:02}", "prompt": f"What is {at} and {at + 1}?"}
                file.write(json.dumps(row | {"max_tokens": 16, "temperature": 0}) + "\n")
        store = SqliteStore(folder / "jobs.db")
        manifest, blobs = stub_engine.manifest()
        for content in blobs.values():
            store.put_blob(content)
        store.publish(manifest)
        served = published(store, None)
        timed = Timed()
        timed.wrap(store, "add_shard")
        timed.wrap(store, "accept")
        timed.wrap(submitting, "check")
        timed.wrap(submitting, "validate")
        before_mb, started_s = peak_mb(), time.perf_counter()
        with open_input(str(folder / "in.jsonl"), name) as source:
            done = submitting.submit(store, source, Ask(), lambda: served)
        total_s = time.perf_counter() - started_s
        validate_s, plan_s = timed.seconds["validate"], timed.seconds["check"] - timed.seconds["validate"]
        store_s = total_s - timed.seconds["check"]
        figures = {
            "rows": count, "shards": done.job.shards, "total_s": total_s, "rows_s": count / total_s,
            "validate_rows_s": count / validate_s, "plan_and_cut_rows_s": count / plan_s,
            "read_and_store_rows_s": count / store_s, "add_shard_s": timed.seconds["add_shard"],
            "accept_s": timed.seconds["accept"], "peak_above_imports_mb": peak_mb() - before_mb,
            "input_mb": (folder / "in.jsonl").stat().st_size / 2**20,
            "store_mb": (folder / "jobs.db").stat().st_size / 2**20,
        }  # fmt: skip
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
