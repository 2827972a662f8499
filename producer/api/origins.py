"""Whether a browser asks on the word of a page that is not ours."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from loramill.producer.api.errors import ApiError

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def check_host(headers: Headers, hosts: Collection[str]) -> None:
    """Raises ApiError (403) unless the server is called by one of these names: a page of the web can have a name of its
    own resolved to this machine, but not change what it is called by."""
    if _host_of(headers.get("host", "")) not in hosts:
        raise ApiError(403, "a server without API keys answers only to its own host name", code="host_not_allowed")


def check_origin(headers: Headers, method: str, *, strict: bool) -> None:
    """Raises ApiError (403) for a request that could change something, if it comes from another site's page; `strict`:
    or does not say whence."""
    if method in _SAFE:
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        ours = site in ("same-origin", "none")
    elif origin is not None:
        ours = urlsplit(origin).netloc == headers.get("host")
    else:
        ours = not strict
    if not ours:
        raise ApiError(403, "the request comes from another site's page", code="cross_site_request")


def _host_of(header: str) -> str:
    """Without the port; `[::1]` keeps its brackets."""
    host, colon, port = header.rpartition(":")
    return (host if colon and port.isdigit() else header).lower()
