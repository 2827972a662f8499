"""What every request passes before anything looks at it: who asks, how often, how much; and what every answer has."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramill.producer.api.bodies import Body
from loramill.producer.api.context import Api, Caller
from loramill.producer.api.errors import ApiError, of_store
from loramill.producer.api.metrics import metrics_of
from loramill.producer.api.origins import check_host, check_origin
from loramill.producer.api.page import login_page
from loramill.producer.api.rates import Rate, Rates
from loramill.producer.api.session import COOKIE, Sessions, cookie_of
from loramill.store.errors import StoreError

FREE = frozenset({"/healthz", "/readyz"})
"""Paths that ask for no key, and are not written down."""
MAX_HEADERS = 100
MAX_AT_ONCE = 1000
"""Requests that are being answered."""
GONE = 499
"""The status that is written down for a client that went before it was answered."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
}

_ENDING = ApiError(503, "the server ends; try again", code="server_ends", headers={"retry-after": "2"})

_access = logging.getLogger("loramill.access")


@dataclass(slots=True)
class _Passing:
    """One request on its way."""

    id: str
    began_s: float
    name: str = "-"
    """Of the key that asks."""
    rate: Rate | None = None
    status: int = 0


class Gate:
    """ASGI around the whole application. Everything is denied that is not let pass."""

    def __init__(self, app: ASGIApp, api: Api, *, hosts: Collection[str] | None, closing: asyncio.Event) -> None:
        """`hosts`: names by which a server without keys may be called; None for any. `closing`: set when the server
        is to end."""
        self._app, self._api, self._hosts, self._closing = app, api, hosts, closing
        # Now, and not in the thread of the first who asks for them: there are one server's, once.
        self._metrics = metrics_of(api)
        self._sessions, self._rates = Sessions(api), Rates()
        self._at_once = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, and writes down that it did."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        passing = _Passing(given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}", time.monotonic())
        scope.setdefault("state", {})["request_id"] = passing.id
        body = Body(scope, headers, receive, self._api.limits, self._closing)

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                passing.status = message["status"]
                _dress(MutableHeaders(scope=message), scope["path"], passing)
            await body.send(message, send)

        self._at_once += 1
        try:
            await self._pass(scope, headers, body, say, passing)
        except (ApiError, StoreError) as error:
            said = of_store(error) if isinstance(error, StoreError) else error
            await said.response()(scope, body.receive, say)
        except asyncio.CancelledError:
            if not self._closing.is_set():
                raise
            if not passing.status:
                await _ENDING.response()(scope, body.receive, say)
        except Exception:
            # The application has answered, and said in the log what happened.
            if not passing.status:
                raise
        finally:
            self._at_once -= 1
            self._write_down(scope, passing)

    async def _pass(self, scope: Scope, headers: Headers, body: Body, say: Send, passing: _Passing) -> None:
        """Raises ApiError for what is not let pass."""
        if self._at_once > MAX_AT_ONCE:
            raise ApiError(503, "too many requests at once; try again", code="overloaded", headers={"retry-after": "1"})
        if len(headers.raw) > MAX_HEADERS:
            raise ApiError(431, f"over {MAX_HEADERS} headers", code="too_many_headers")
        if self._hosts is not None:
            check_host(headers, self._hosts)
        path, method = scope["path"], scope["method"]
        if path not in FREE:
            caller = await self._caller(headers, method)
            if caller is None:
                if path in ("/", "/login") and method in ("GET", "HEAD"):
                    return await login_page()(scope, body.receive, say)
                if (path, method) != ("/login", "POST"):
                    raise _nobody(headers)
            else:
                self._count(caller, passing)
                scope["state"]["caller"] = caller
        await body.check()
        await self._app(scope, body.receive, say)
        await body.let_go(say)

    async def _caller(self, headers: Headers, method: str) -> Caller | None:
        """Who asks: by a token, or else by a session's cookie."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind:
            return self._api.keys.caller(token.strip() if kind.lower() == "bearer" else None)
        # What a browser sends by itself, on the word of any page, is let pass only from our own.
        cookie = cookie_of(headers)
        check_origin(headers, method, strict=cookie is not None and not self._api.keys.open)
        if self._api.keys.open or cookie is None:
            return self._api.keys.caller(None)
        return await self._sessions.caller(cookie)

    def _count(self, caller: Caller, passing: _Passing) -> None:
        passing.name = caller.name or "-"
        if self._api.keys.open:
            return
        passing.rate = self._rates.take(caller.name, caller.quota.requests_per_minute)
        if passing.rate.retry_s:
            raise ApiError(
                429, f"over {passing.rate.limit} requests a minute", code="rate_limit_exceeded",
                headers=passing.rate.headers,
            )  # fmt: skip

    def _write_down(self, scope: Scope, passing: _Passing) -> None:
        """One line, with nothing that was in the request but its method; and the metrics."""
        took_s = time.monotonic() - passing.began_s
        status = passing.status or GONE
        self._metrics.count(scope, status, took_s)
        if scope["path"] not in FREE:
            route, took_ms = getattr(scope.get("route"), "path", "-"), 1000 * took_s
            _access.info(
                "%s %s %s %d %.0f ms key=%s", passing.id, scope["method"], route, status, took_ms, passing.name
            )


def _nobody(headers: Headers) -> ApiError:
    said = "that API key is not known" if "authorization" in headers or COOKIE in headers.get("cookie", "") else (
        "no API key is given: send `Authorization: Bearer KEY`"
    )  # fmt: skip
    return ApiError(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _dress(headers: MutableHeaders, path: str, passing: _Passing) -> None:
    """What every answer has."""
    headers["x-request-id"] = passing.id
    for name, value in (_ALWAYS | (passing.rate.headers if passing.rate else {})).items():
        headers.setdefault(name, value)
    if path.startswith("/v1"):
        headers.setdefault("cache-control", "no-store")
