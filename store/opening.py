"""From a store's URL to the store."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit

from loramill.store.contract import LEASE_S, RETENTION_S, JobStore
from loramill.store.part_files import Files

EXAMPLES = "sqlite:///jobs.db, sqlite:////var/lib/loramill/jobs.db, redis://host:6379/0"
_REDIS = ("redis", "rediss", "unix")
_SWITCH = {"1": True, "0": False}


def open_store(
    url: str,
    *,
    files: Files | str | None = None,
    prefix: str = "loramill",
    create: bool = True,
    volatile: bool = False,
    retention_s: float = RETENTION_S,
    lease_s: float = LEASE_S,
) -> JobStore:
    """The store at `sqlite:///path` (`sqlite:////path` from the root), `redis://`, `rediss://` or `unix://`.

    `files`: where payloads are kept instead of in the store, or the URL of that folder. `prefix`: of all keys in Redis.
    `create`: whether a store that was never written to is made, or refused by StoreLost. `volatile`, or `?volatile=1`:
    a Redis that forgets everything with its end will do. Raises ValueError for what is no such URL, and StoreError.
    """
    scheme, options = urlsplit(url).scheme.lower(), dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    if scheme == "sqlite":
        path = _sqlite_path(url, options)
        from loramill.store.sqlite_store import SqliteStore

        return SqliteStore(path, files=_files(files), create=create, retention_s=retention_s, lease_s=lease_s)
    if scheme not in _REDIS:
        raise ValueError(f"{_named(url)} is no store's URL: give one such as {EXAMPLES}")
    given = options.pop("volatile", "1" if volatile else "0")
    if given not in _SWITCH:
        raise ValueError(f"volatile={given} in a store's URL: give 1 or 0")
    if scheme != "unix" and not urlsplit(url).hostname:
        raise ValueError(f"{_named(url)} names no host: give a URL such as redis://host:6379/0")
    from loramill.store.redis_store import RedisStore

    # Not by urlunsplit, which takes the slashes of unix:///path for nothing.
    plain = url.partition("?")[0] + (f"?{urlencode(options)}" if options else "")
    return RedisStore(
        plain,
        files=_files(files),
        prefix=prefix,
        create=create,
        volatile=_SWITCH[given],
        retention_s=retention_s,
        lease_s=lease_s,
    )


def _sqlite_path(url: str, options: Mapping[str, str]) -> str:
    path = url[len("sqlite:///") :].split("?")[0]
    if not url.lower().startswith("sqlite:///") or not path.strip("/"):
        raise ValueError(
            f"{url} names no file: give a URL such as sqlite:///jobs.db or, from the root, sqlite:////jobs.db"
        )
    if options:
        raise ValueError(f"{url} has {', '.join(options)}: a sqlite URL takes no options")
    return path


def _files(given: Files | str | None) -> Files | None:
    return Files(given) if isinstance(given, str) else given


def _named(url: str) -> str:
    """As it can be shown: without a password."""
    return url if "@" not in url else f"...@{url.rpartition('@')[2]}"
