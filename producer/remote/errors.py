"""What can go wrong between a client and its server."""

from __future__ import annotations

import json
from collections.abc import Mapping


class ClientError(Exception):
    """What the server, or the way to it, would not do."""


class Unreachable(ClientError):
    """No whole answer came: no server, a connection that broke, or no answer in time."""

    def __init__(self, message: str, *, sent: bool) -> None:
        """`sent`: whether the server may have seen the request."""
        super().__init__(message)
        self.sent = sent


class Damaged(ClientError):
    """What came is not what the server has; nothing of it was kept."""


class Refused(ClientError):
    """The server answered with an error."""

    def __init__(
        self, status: int, message: str, *, code: str | None, param: str | None, request_id: str | None, passing: bool
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.request_id = request_id
        """What the server's log knows it by."""
        self.passing = passing
        """Whether the same request may be answered later."""

    def __str__(self) -> str:
        known = ", ".join(part for part in (self.code, self.request_id) if part)
        return f"{self.status}: {self.message}{f' ({known})' if known else ''}"


_PASSING = frozenset({408, 409, 429, 502, 503, 504})


def refused(status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    """An answer as an error, whoever made it: a proxy's is no JSON, or another."""
    try:
        said = json.loads(body)["error"]
        message, code, param = str(said["message"]), said.get("code"), said.get("param")
    except (ValueError, TypeError, KeyError, AttributeError):
        message, code, param = body[:200].decode(errors="replace").strip() or "no reason was given", None, None
    return Refused(
        status,
        message,
        code=code,
        param=param,
        request_id=headers.get("x-request-id"),
        passing=status in _PASSING and headers.get("x-should-retry") != "false",
    )
