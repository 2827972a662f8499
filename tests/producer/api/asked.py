"""A live server over a store, and who asks it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from loramill.producer.api.app import make_app
from loramill.producer.api.asking import questions_of
from loramill.producer.api.connection import Connection
from loramill.producer.api.context import Api
from loramill.producer.api.keys import Keys
from loramill.store.contract import JobStore
from tests.worker.queueing import until


@contextmanager
def asked(store: JobStore, keys: Path | None = None) -> Iterator[str]:
    """The URL of a server in this process, which ends with the block; the store stays open."""
    api = Api(store, Keys(keys))
    config = uvicorn.Config(make_app(api), port=0, http=Connection, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    questions = questions_of(api)
    questions.start()
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        questions.close()
