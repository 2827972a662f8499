"""Real redis-servers for tests: each on a port and in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import redis

MISSING = "no redis-server: install Redis 7 or newer (Debian: apt-get install --no-install-recommends redis-server)"
START_S = 20.0


def has_redis() -> bool:
    """Whether there is a redis-server to start, and new enough."""
    if shutil.which("redis-server") is None:
        return False
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"v=(\d+)", said)
    return version is not None and int(version[1]) >= 7


class RedisServer:
    """A redis-server on loopback, from when it is entered until it is left."""

    def __init__(self, folder: Path, *, tls: bool = False, **settings: str) -> None:
        """`settings`: of redis.conf, with `_` for `-`; by default there is an AOF that is synced every second, and no
        snapshot. `tls`: with a certificate of its own, `folder/server.crt`, and no port without."""
        self.folder, self.tls = folder, tls
        self.settings = {"appendonly": "yes", "appendfsync": "everysec", "save": ""} | {
            name.replace("_", "-"): value for name, value in settings.items()
        }
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if tls:
            make_certificate(folder)

    @property
    def url(self) -> str:
        """Of database 0; with TLS, of the server's certificate too."""
        if self.tls:
            return f"rediss://localhost:{self.port}/0?ssl_ca_certs={self.folder}/server.crt"
        password = f":{self.settings['requirepass']}@" if "requirepass" in self.settings else ""
        return f"redis://{password}127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Starts it, on the same port and folder as before. Returns once it answers and has loaded its data."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", "-"], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{name} {quoted(value)}\n" for name, value in self._all()).encode())
        self.process.stdin.close()
        give_up = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise RuntimeError(f"redis-server did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Asks it to end, which writes what it has to."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: nothing more is written."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """It keeps its connections, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """After `pause`."""
        self._signal(signal.SIGCONT)

    def client(self) -> Any:
        """A client of redis-py's own, to look and to meddle."""
        path = f"{self.folder}/server.crt" if self.tls else None
        tls = {"ssl": True, "ssl_ca_certs": path} if self.tls else {}
        return redis.Redis(
            "localhost" if self.tls else "127.0.0.1", self.port, password=self.settings.get("requirepass"), protocol=2,
            socket_timeout=10, **tls,
        )  # fmt: skip

    def cli(self, *command: str | int) -> Any:
        """One command's answer."""
        with self.client() as client:
            return client.execute_command(*command)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.resume()
        self.kill()

    def _all(self) -> list[tuple[str, str]]:
        port: Mapping[str, str] = {"port": str(self.port)}
        if self.tls:
            crt, key = f"{self.folder}/server.crt", f"{self.folder}/server.key"
            port = {
                "port": "0", "tls-port": str(self.port), "tls-cert-file": crt, "tls-key-file": key,
                "tls-ca-cert-file": crt, "tls-auth-clients": "no",
            }  # fmt: skip
        return [*port.items(), ("bind", "127.0.0.1"), ("dir", str(self.folder)), *self.settings.items()]

    def _answers(self) -> bool:
        try:
            self.cli("PING")
        except redis.AuthenticationError:
            return True  # the settings have a user's list of their own
        except redis.NoPermissionError:
            return True
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        return True

    def _signal(self, which: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(which)

    def _end(self, which: signal.Signals) -> None:
        self._signal(which)
        if self.process is not None:
            self.process.wait(START_S)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_certificate(folder: Path) -> None:
    """`server.crt`, for localhost and signed by itself, and `server.key`."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", "server.key", "-out", "server.crt"],
        cwd=folder, check=True, capture_output=True, env={**os.environ, "OPENSSL_CONF": os.devnull},
    )  # fmt: skip


def quoted(value: str) -> str:
    """As redis.conf takes it; `save ""` is no snapshot."""
    return value or '""'
