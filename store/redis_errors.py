"""What Redis says, in the words of the store's contract."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import redis

from loramill.store.errors import (
    Fenced,
    JobNotFound,
    StoreError,
    StoreFull,
    StoreLost,
    StoreRefused,
    StoreUnreachable,
)
from loramill.store.shelf import RecordChanged, RecordExists, RecordNotFound

MIN_VERSION = (7, 0)
REPLICA = "{url} is a replica, or read-only: give the URL of its master"
CLUSTER = "{url} is part of a Redis Cluster, which cannot be used: give a single server"
_AUTHENTICATION = (redis.AuthenticationError, redis.exceptions.AuthenticationWrongNumberOfArgsError)
_FULL = {"OOM", "MISCONF"}
_REPLICA = {"READONLY", "MASTERDOWN"}
_CLUSTER = {"MOVED", "ASK", "CLUSTERDOWN", "CROSSSLOT", "TRYAGAIN"}
_PASSING = {"BUSY", "NOREPLICAS", "LOADING"}

_SAID: Mapping[str, tuple[type[StoreError], str]] = {
    "NOTFOUND": (JobNotFound, "{url} has no such job, or not in that state: {about}"),
    "TAKEN": (StoreRefused, "{url} has a job {about} already"),
    "RUNNING": (StoreRefused, "the job {about} has not ended: cancel it first"),
    "FENCED": (Fenced, "the lease on a shard of {about} was lost"),
    "NOMANIFEST": (StoreLost, "{url} does not know the manifest {about}: publish it first"),
    "POSITION": (StoreError, "results of {about} are of rows that their shard does not have"),
    "NORECORD": (RecordNotFound, "there is no {about}"),
    "EXISTS": (RecordExists, "there is a {about} already"),
    "CHANGED": (RecordChanged, "the {about} was changed meanwhile"),
    "LOST": (
        StoreLost,
        "{url} is not the store that it was: a restart lost its data, or somebody removed it",
    ),
}
"""What our scripts say -> what it is."""


def said(error: redis.RedisError, url: str, about: str) -> StoreError | None:
    """What one of our scripts said, if it was one of them. `about`: the job, or whatever the command was for."""
    kind, text = _SAID.get(code_of(error), (None, ""))
    return kind(text.format(url=url, about=about)) if kind else None


def translated(error: redis.RedisError | OSError, url: str, *, opening: bool = False) -> StoreError:
    """Any failure as a StoreError of one line that says what to do next."""
    text, code = " ".join(str(error).split()), code_of(error)
    if isinstance(error, _AUTHENTICATION):
        return StoreRefused(
            f"{url} refused the user or password: {text}; the URL is redis://USER:PASSWORD@HOST:PORT/DB"
        )
    if code == "NOPERM" or "The user executing the script can't" in text:
        return StoreRefused(f"{url} gives this user too few rights: {text}; it needs +@all -@admin ~PREFIX:*")
    if (tls := _tls_trouble(error)) is not None:
        return StoreRefused(f"{url}: the TLS connection failed: {tls}")
    if code in _FULL:
        return StoreFull(f"{url} takes nothing more: {text}")
    if code in _REPLICA:
        return StoreRefused(REPLICA.format(url=url))
    if code in _CLUSTER:
        return StoreRefused(CLUSTER.format(url=url))
    if code in _PASSING or isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        hint = _scheme_hint(url, text) if opening else ""
        return StoreUnreachable(f"{url} does not answer: {text}{hint}")
    return StoreRefused(f"{url} refused a command: {text}")


def unusable(info: Mapping[str, Any], url: str) -> str | None:
    """Why the server of this INFO cannot hold a store, or None."""
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"{url} is Redis {version}: 7.0 or newer is needed"
    if info.get("cluster_enabled"):
        return CLUSTER.format(url=url)
    if info.get("role") != "master":
        return REPLICA.format(url=url)
    if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
        return f"{url} may evict what was accepted (maxmemory-policy {policy}): set it to noeviction"
    return None


def code_of(error: BaseException) -> str:
    """The first word of a server's error, or ''."""
    if not isinstance(error, redis.ResponseError | redis.ConnectionError):
        return ""
    return str(getattr(error, "status_code", None) or str(error).split(" ")[0].rstrip("."))


def _scheme_hint(url: str, text: str) -> str:
    """A server takes the other kind of beginning for noise: with TLS it hangs up, without it waits for more."""
    if url.startswith("redis:") and ("closed by server" in text or "reset by peer" in text):
        return " (if it wants TLS: rediss://)"
    return " (if it has no TLS: redis://)" if url.startswith("rediss:") and "Timeout" in text else ""


def _tls_trouble(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {cause.verify_message}; add ?ssl_ca_certs=FILE to the URL"
        if isinstance(cause, ssl.SSLError):
            return f"{cause.reason or cause}; without TLS it is redis://"
        cause = cause.__cause__ or cause.__context__
    return None
