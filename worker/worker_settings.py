"""What a worker is told beside its model: the flags of `loramill worker`, and the same as environment variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from loramill.worker.durations import seconds_of
from loramill.worker.settings import DEVICE, MODEL_FLAGS, POSITIVE, ModelOptions, flag, settings_from

AGAIN = 75
"""The exit code of a worker that should be started again (EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions(ModelOptions):
    """One worker, as its operator asked for it."""

    store: str
    files: str | None = None
    store_prefix: str = "loramill"
    broker: str | None = None
    """None takes the store's Redis."""
    concurrency: int = 4
    """Shards at a time in one engine."""
    lease_s: float = 30.0
    hang_timeout_s: float = 300.0
    watchdog_s: float = 60.0
    until_empty: bool = False
    worker_id: str | None = None

    @property
    def name(self) -> str:
        """What others know the worker by."""
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"


_STORE = {"metavar": "URL", "help": "Where jobs are: redis://HOST:PORT/DB, rediss://, unix://, or sqlite:///PATH."}
FILES = flag("--files", metavar="URL",
             help="A folder for rows and results: file://, s3://, ...  [default: in the store itself]")  # fmt: skip
PREFIX = flag("--store-prefix", default="loramill", metavar="NAME", help="What every key in Redis begins with.")
STORE_FLAGS = [flag("--store", **_STORE), FILES, PREFIX]
"""Of commands, which say by themselves that a store is missing."""
BROKER = flag("--broker", metavar="URL", help="Where tickets are.  [default: the store's Redis]")

BASE_MODEL, *_MODEL_FLAGS = MODEL_FLAGS
NODE_FLAGS = [
    flag("--concurrency", type=POSITIVE, default=4, help="Shards at a time in one engine."),
    flag("--lease", dest="lease_s", callback=seconds_of, default="30", metavar="TIME",
         help="Shards of a worker that is silent for so long go to others."),
    flag("--hang-timeout", dest="hang_timeout_s", callback=seconds_of, default="300", metavar="TIME",
         help="An engine that is busy for so long without a step is killed."),
    flag("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|all",
         help="Where to compute: cuda is a GPU that no other worker has, all is every such."),
    *(one for one in _MODEL_FLAGS if one is not DEVICE),
]  # fmt: skip
"""How a worker does its work, with --base-model."""

WORKER_FLAGS = [
    flag("--store", required=True, **_STORE), FILES, PREFIX, BROKER,
    flag("--watchdog", dest="watchdog_s", callback=seconds_of, default="60", metavar="TIME",
         help="A worker that gets no ticket for so long while shards wait ends with code 75, to be started again."),
    flag("--until-empty", is_flag=True, help="End when no job has rows left."),
    flag("--id", dest="worker_id", metavar="NAME",
         help="What others know the worker by.  [default: host and process id]"),
    BASE_MODEL, *NODE_FLAGS,
]  # fmt: skip


def worker_options_from(environ: Mapping[str, str]) -> WorkerOptions:
    """Raises Failure like `settings_from`."""
    return settings_from(environ, WORKER_FLAGS, WorkerOptions)
