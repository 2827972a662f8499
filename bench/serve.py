"""`python -m bench.serve`: whether a server stays small and quick while large files pass through it.

`loramill serve` in a process of its own, on SQLite and on Redis: clients look at their batches once a second while one
file is uploaded and another downloaded, again and again. All of it shares the machine's cores. The server's memory is
compared with what it had when it knew the batches and was asked nothing, and the slowest look is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Self

import openai
import psutil

from bench import ROOT, hide_root, machine
from bench.keep import keep
from tests.servers import RedisServer, free_port

CLIENTS, SECONDS, FILE_MB, BATCHES = 200, 30.0, 200, 20
_MB = 10**6


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--file-mb", type=int, default=FILE_MB)
    parser.add_argument("--stores", nargs="+", choices=["sqlite", "redis"], default=["sqlite", "redis"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serve.json")
    options = parser.parse_args(arguments)
    stores: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        rows = _write_rows(Path(name) / "rows.jsonl", options.file_mb * _MB)
        for store in options.stores:
            with machine.watch_others() as others, _store(store, Path(name) / store) as url:
                stores[store] = _measure(url, Path(name), rows, options)
            stores[store]["others_cores"] = others[0] if others else None
    found = {
        "clients": options.clients,
        "file_bytes": options.file_mb * _MB,
        "stores": stores,
    }
    keep(options.out, "serve", "bench.serve", arguments, found)
    return 0


def _measure(store_url: str, folder: Path, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    file_id = _put(store_url, rows)
    with _server(store_url, folder) as (url, server):
        started = server.memory_info().rss
        batches = _open_batches(store_url, url, folder)
        idle = server.memory_info().rss
        peak, cpu_s = idle, sum(server.cpu_times()[:2])
        loads: dict[str, Sequence[object]] = {
            "upload": [rows], "download": [file_id, rows.stat().st_size], "poll": [options.clients, *batches],
        }  # fmt: skip
        with ExitStack() as stack:
            clients = {
                what: stack.enter_context(_Load(what, url, options.seconds, *given)) for what, given in loads.items()
            }
            while any(client.runs for client in clients.values()):
                peak = max(peak, server.memory_info().rss)
                time.sleep(0.02)
            said = {what: client.said() for what, client in clients.items()}
            cpu_s = sum(server.cpu_times()[:2]) - cpu_s
        looks = sorted(said["poll"])
    return {
        "started_rss_bytes": started,
        "idle_rss_bytes": idle,
        "peak_rss_bytes": peak,
        "server_cpu_s": cpu_s,
        "looks": len(looks),
        "median_s": median(looks),
        "p99_s": looks[int(len(looks) * 0.99)],
        "slowest_s": looks[-1],
        "uploads_s": said["upload"],
        "downloads_s": said["download"],
    }


def _open_batches(store_url: str, url: str, folder: Path) -> list[str]:
    """Batches that run and do not end: their worker is gone once they were accepted."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        with _worker(store_url, folder):
            made = _accepted(client)
        assert {client.batches.retrieve(batch).status for batch in made} == {"in_progress"}
        return made


def _accepted(client: openai.OpenAI) -> list[str]:
    line = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "SLOW", "max_tokens": 1000}}
    lines = [json.dumps({"custom_id": str(number), **line}) for number in range(500)]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    asked: Any = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    made = [client.batches.create(**asked, metadata={"number": str(number)}).id for number in range(BATCHES)]
    while any(client.batches.retrieve(batch).status == "validating" for batch in made):
        time.sleep(0.5)
    return made


def _write_rows(path: Path, size: int) -> Path:
    """Rows of words: they pack as text does."""
    chance = random.Random(0)
    words = [f"{chance.getrandbits(40):x}"[: chance.randint(2, 9)] for _ in range(20_000)]
    with path.open("w") as file:
        while file.tell() < size:
            prompt = " ".join(chance.choices(words, k=120))
            body = {"model": f"a{chance.randrange(16):02}", "prompt": prompt, "max_tokens": 100}
            line = {"custom_id": f"row-{file.tell()}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def _put(store_url: str, rows: Path) -> str:
    """A file that is there before the server starts."""
    from loramill.producer.api.contents import Contents
    from loramill.store.opening import open_store

    with (
        open_store(store_url) as store,
        Contents(store.shelf).begin("", "there.jsonl", "batch") as writing,
        rows.open("rb") as file,
    ):
        while data := file.read(2**20):
            writing.write(data)
        return writing.finish().id


@contextmanager
def _store(kind: str, folder: Path) -> Iterator[str]:
    folder.mkdir()
    if kind == "sqlite":
        yield f"sqlite:///{folder}/store.db"
        return
    with RedisServer(folder) as server:
        yield server.url


@contextmanager
def _server(store_url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _process(["serve", "--store", store_url, "--port", str(port)], folder, {}) as process:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            give_up = time.monotonic() + 60
            while True:
                assert process.poll() is None and time.monotonic() < give_up
                try:
                    client.files.list(limit=1)
                    break
                except openai.APIConnectionError:
                    time.sleep(0.1)
        yield url, psutil.Process(process.pid)


@contextmanager
def _worker(store_url: str, folder: Path) -> Iterator[None]:
    stub = {"LORAMILL_CHILD": f"{sys.executable} -m tests.stub_engine", "STUB_STEP_S": "1"}
    with _process(["worker", "--store", store_url, "--base-model", "stub"], folder, stub):
        yield


@contextmanager
def _process(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours; its log is kept until the end."""
    command = [sys.executable, "-c", "from loramill.producer.cli import main; main()", *arguments]
    with (folder / f"{arguments[0]}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=_environment() | environment)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class _Load:
    """Clients in a process of their own, which is ready when this returns, and killed if it runs when this is left."""

    def __init__(self, *given: object) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this; a pipe would hold up who says much)
        command = [sys.executable, "-m", "bench.serve_load", *map(str, given)]
        self._process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=self._said)
        while self.runs and not os.fstat(self._said.fileno()).st_size:
            time.sleep(0.01)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def said(self) -> Any:
        """Once it has ended."""
        assert self._process.returncode == 0
        self._said.seek(0)
        return json.loads(self._said.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
