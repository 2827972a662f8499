"""`loramill serve` as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.servers import free_port
from tests.worker.queueing import ENVIRONMENT, until

START_S = 90.0
"""FastAPI, and on a busy machine other tests beside it."""
MAIN = "from loramill.producer.cli import main; main()"
STUB = ("--embedded", "--base-model", "stub", "--device", "cpu")
"""With a worker, whose engine is the stub."""


class Server:
    """One on loopback, from when it is entered until it is left."""

    def __init__(self, folder: Path, *arguments: object, before: str = "", **environment: str) -> None:
        """`arguments` of the command beside its port; `before` is Python that runs in it first; `environment` beside
        that of the stub engine."""
        self.folder, self.port = folder, free_port()
        code = f"{before}\n{MAIN}"
        self._line = [sys.executable, "-c", code, "serve", "--port", str(self.port), *map(str, arguments)]
        self._environment = {**os.environ, **ENVIRONMENT, **environment}
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Of its root."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """What clients call the base URL."""
        return f"{self.url}/v1"

    @property
    def log(self) -> str:
        """All that it said."""
        return (self.folder / "serve.log").read_text()

    def start(self) -> Self:
        """Starts it, on the same port and folder as before. Returns once it listens."""
        before = len(self.log) if (self.folder / "serve.log").exists() else 0
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                env=self._environment,
            )  # fmt: skip
        until(lambda: self._listens(before), START_S)
        return self

    def ready(self) -> Self:
        """Returns once it has heard of a worker that has told what it serves."""
        until(lambda: self._said("/readyz")["workers"] > 0, START_S)
        until(lambda: bool(re.search(r"with \d+ adapters on .*, ready", self.log)), START_S)
        return self

    def stop(self) -> int:
        """As its operator does; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                self.stop()
        finally:
            self.kill()
        assert "Traceback" not in self.log, self.log

    def _listens(self, before: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
        return "listening on" in self.log[before:]

    def _said(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            said: dict[str, Any] = json.load(answer)
        return said
