"""The way to a Redis server: connections, the scripts, and what can go wrong with them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from loramill.store.errors import StoreLost, StoreRefused
from loramill.store.redis_errors import said, translated, unusable

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
HEALTH_CHECK_S = 25
"""A connection that was quiet for so long is tried before it is used."""
MAX_CONNECTIONS = 1024
"""One for each thread that is inside the store."""
FORMAT = 2
_QUERY = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs", "db"}


class Link:
    """A server, as one store sees it. Any thread may use it."""

    def __init__(
        self, url: str, prefix: str, *, timeout_s: float = READ_TIMEOUT_S, clock: Callable[[], float] | None = None
    ) -> None:
        """Connects to nothing yet. Raises StoreRefused for a URL that is none."""
        self.url, self.prefix, self._clock = public_url(url), prefix, clock
        self.id = ""
        """Of the store, once it was opened."""
        self._scripts = _scripts()
        try:
            pool: Any = redis.ConnectionPool.from_url(
                _checked(url),
                socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=timeout_s,
                health_check_interval=HEALTH_CHECK_S, max_connections=MAX_CONNECTIONS,
                # The pool connects anew if an idle connection was closed. Nothing that was sent is sent again.
                retry=Retry(NoBackoff(), 0),
                # The name is for CLIENT LIST. And that there is an answer to it takes TLS 1.3's tickets off the wire,
                # which redis-py 8.1 otherwise takes for a connection in disorder.
                protocol=2, driver_info=None, client_name="loramill",
            )  # fmt: skip
        except ValueError as error:
            raise StoreRefused(f"{self.url} is not a store's URL: {error}") from error
        self._client: Any = redis.Redis(connection_pool=pool)

    def open(self, *, create: bool) -> None:
        """Finds the store, or makes it. Raises StoreLost if it is not there and not to be made."""
        key = f"{self.prefix}:store"
        with self._mapped():
            found, kind = self._client.hmget(key, "id", "format")
            if found is None and create:
                self._client.eval(_CREATE, 0, key, secrets.token_hex(8), FORMAT)
                found, kind = self._client.hmget(key, "id", "format")
        if found is None:
            raise StoreLost(f"nothing was ever submitted to {self.url} (prefix {self.prefix}), or it lost its data")
        if int(kind) != FORMAT:
            raise StoreRefused(
                f"{self.url} is of format {int(kind)}, and this loramill uses format {FORMAT}: "
                "finish its jobs with the version that made it"
            )
        self.id = found.decode()

    def call(self, script: str, *args: str | bytes | float, about: object = None) -> Any:
        """Runs `lua/SCRIPT.lua`, atomically. `about`: what to name when it is refused; the first argument if not
        given. Raises what the script says, or StoreError."""
        now = "" if self._clock is None else round(self._clock() * 1000)
        sha, text = self._scripts[script]
        given = (self.prefix, self.id, now, *args)
        with self._mapped(args[0] if about is None and args else about):
            try:
                return self._client.evalsha(sha, 0, *given)
            except redis.exceptions.NoScriptError:
                return self._client.eval(text, 0, *given)

    def read(self, *commands: tuple[str | int, ...]) -> list[Any]:
        """The answers to commands that read, all of one moment. Keys are given without the prefix."""
        return list(self.call("read", *(part for command in commands for part in (len(command), *command))))

    def info(self) -> Mapping[str, Any]:
        """The server's INFO. Raises StoreRefused if it is none that can hold a store."""
        with self._mapped():
            info: Mapping[str, Any] = self._client.info()
        if (reason := unusable(info, self.url)) is not None:
            raise StoreRefused(reason)
        return info

    def snapshots(self) -> bool:
        """Whether the server saves snapshots by itself; no, if it does not tell."""
        try:
            with self._mapped():
                return bool(self._client.config_get("save").get("save"))
        except StoreRefused:
            return False

    def close(self) -> None:
        """Lets go of all connections."""
        self._client.connection_pool.disconnect()

    @contextmanager
    def _mapped(self, about: object = None) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            known = said(error, self.url, str(about)) if isinstance(error, redis.RedisError) else None
            raise known or translated(error, self.url, opening=not self.id) from error


def public_url(url: str) -> str:
    """The URL without its password and options."""
    if _torn(parts := urlsplit(url)):
        return f"{parts.scheme}://..."
    user = f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}"


def _checked(url: str) -> str:
    """The URL for redis-py, which would ignore what it does not know."""
    if _torn(parts := urlsplit(url)):
        raise ValueError("in a password / ? # are written %2F %3F %23")
    if unknown := [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name not in _QUERY]:
        raise ValueError(f"it has no option {unknown[0]}")
    if parts.scheme != "unix" and not (parts.path.strip("/") or "0").isdigit():
        raise ValueError(f"a database is a number, not {parts.path.strip('/')}")
    return url


def _torn(parts: SplitResult) -> bool:
    """Whether what comes after the host has the end of a password in it, which must not be shown."""
    return any("@" in part for part in (parts.path, parts.query, parts.fragment))


_CREATE = """#!lua
if redis.call('EXISTS', ARGV[1]) == 0 then redis.call('HSET', ARGV[1], 'id', ARGV[2], 'format', ARGV[3]) end
"""


def _scripts() -> Mapping[str, tuple[str, str]]:
    """Every script by its file's name: its hash and its text, with `lib.lua` after its first line. Those of the shelf
    have `shelf/lib.lua` as well."""
    folder = resources.files("loramill.store") / "lua"
    jobs, shelf = _texts(folder), _texts(folder / "shelf")
    libs = {"": jobs.pop("lib")}
    libs["shelf/"] = f"{libs['']}\n{shelf.pop('lib')}"
    made = {}
    for prefix, texts in (("", jobs), ("shelf/", shelf)):
        for name, text in texts.items():
            flags, body = text.split("\n", 1)
            whole = f"{flags}\n{libs[prefix]}\n{body}"
            made[prefix + name] = (hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest(), whole)
    return made


def _texts(folder: Traversable) -> dict[str, str]:
    return {file.name[:-4]: file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".lua")}
