"""`python -m tests.producer.measure_questions [STORE]`: how long a question waits for its first token and for the last,
at a worker with the tiny model and nothing else to do, and beside a job. STORE is a URL, by default a SQLite file's."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
import orjson

from loramill.store.opening import open_store

TINY = Path(__file__).parents[2] / "examples" / "tiny"
ROWS = 20_000
TIMES = 30
COMMAND = (sys.executable, "-c", "from loramill.producer.cli import main; main()")


def ask(client: openai.OpenAI, number: int) -> tuple[float, float]:
    """Seconds to the first token, and to the end of 24 of them."""
    how: Any = {"model": "upper", "prompt": f"row {number}", "temperature": 0, "max_tokens": 24, "stream": True}
    began_s, first_s = time.monotonic(), 0.0
    for chunk in client.completions.create(**how, extra_body={"ignore_eos": True}):
        if not first_s and any(choice.text for choice in chunk.choices):
            first_s = time.monotonic() - began_s
    return first_s, time.monotonic() - began_s


def measure(client: openai.OpenAI, what: str) -> None:
    """Prints the medians and the 95th percentiles."""
    times = [ask(client, number) for number in range(TIMES)]
    for name, values in zip(("first token", "24 tokens"), zip(*times, strict=True), strict=True):
        cuts = statistics.quantiles(values, n=20)
        print(
            f"{what}: {name}: median {statistics.median(values) * 1000:.0f} ms, 95 % {cuts[-1] * 1000:.0f} ms",
            flush=True,
        )


def main() -> None:
    """Starts a worker and a server, and asks."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        store = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/jobs.db"
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        model = ["--base-model", str(TINY / "base"), "--adapters-dir", str(TINY / "adapters"), "--dtype", "float32"]
        worker = subprocess.Popen([*COMMAND, "worker", "--store", store, *model], env=environment)
        server = subprocess.Popen([*COMMAND, "serve", "--store", store, "--port", str(port)], env=environment)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=40)
            client.completions.create(model="", prompt="warm", max_tokens=2)
            measure(client, "idle")
            rows = Path(folder, "rows.jsonl")
            line = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "model": "upper"}
            with rows.open("wb") as out:
                for number in range(ROWS):
                    out.write(orjson.dumps({"id": f"r{number}", "prompt": f"job {number}", **line}) + b"\n")
            subprocess.run(
                [*COMMAND, "submit", str(rows), "--store", store, "--id", "bulk"], env=environment, check=True
            )
            with open_store(store) as opened:
                while not opened.job("bulk").completed:
                    time.sleep(0.1)
                before, began_s = opened.job("bulk").completed, time.monotonic()
                measure(client, "beside a job")
                job, took_s = opened.job("bulk"), time.monotonic() - began_s
                print(f"the job went on at {(job.completed - before) / took_s:,.0f} rows a second", flush=True)
                opened.cancel("bulk")
        finally:
            for process in (server, worker):
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
