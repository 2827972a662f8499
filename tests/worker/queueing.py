"""Jobs for the stub engine, put straight into a store, and workers of it in this process."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from loramill.schemas.job import JobNames, JobSpec
from loramill.store.contract import JobStore
from loramill.store.records import NewShard
from loramill.worker.devices import Device
from loramill.worker.engine_process import CHILD, EngineProcess
from loramill.worker.housekeeping import Housekeeping
from loramill.worker.node import Node
from loramill.worker.worker_settings import WorkerOptions
from tests.contract.building import rows_of
from tests.stub_engine import manifest

REPO = Path(__file__).parents[2]
ENVIRONMENT = {
    CHILD: f"{sys.executable} -m tests.stub_engine",
    "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")]),
}
OPTIONS = WorkerOptions(base_model="stub", store="sqlite:///unused", device="cpu", worker_id="here")


def staged(store: JobStore, job_id: str, prompts: Sequence[str], per_shard: int = 8, **given: Any) -> None:
    """A job with one row a prompt, ready to be claimed."""
    store.stage(JobSpec(id=job_id, base_id=manifest()[0].base_id, names=JobNames(base="stub"), **given))
    lines = [(row, orjson.dumps({"id": f"r{row}", "prompt": prompt})) for row, prompt in enumerate(prompts)]
    for number, start in enumerate(range(0, len(lines), per_shard)):
        store.add_shard(job_id, NewShard(number, lines[start : start + per_shard]))
    store.accept(job_id)


def answers(store: JobStore, job_id: str) -> Mapping[int, str]:
    """Each row's text, or the code of its error."""
    said = {}
    for number, row in rows_of(store, job_id).items():
        body = orjson.loads(row.line)["response"]["body"]
        said[number] = body["error"]["code"] if row.failed else body["choices"][0]["text"]
    return said


def until(condition: Callable[[], bool], timeout_s: float = 30) -> float:
    """Waits for it; how many seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s, "it did not come to pass in time"
        time.sleep(0.02)
    return time.monotonic() - began


@contextmanager
def working(store: JobStore, threads: int = 2, **given: Any) -> Iterator[tuple[Node, Housekeeping]]:
    """A worker in this process, which ends with the block; the store stays open."""
    options = replace(OPTIONS, **given)
    node = Node(options, store, [EngineProcess(options, Device("cpu", "cpu"), options.hang_timeout_s)])
    housekeeping = Housekeeping(node)

    def poll() -> None:
        while not node.drain.asked:
            if not node.work():
                node.drain.wait(0.1)

    pollers = [threading.Thread(target=poll) for _ in range(threads)]
    node.start()
    housekeeping.start()
    for poller in pollers:
        poller.start()
    try:
        yield node, housekeeping
    finally:
        node.drain.ask()
        for poller in pollers:
            poller.join()
        housekeeping.stop()
        node.close()
