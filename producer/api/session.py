"""Signing in with a browser: a key once, then a cookie that only this site's own pages can use."""

from __future__ import annotations

import hashlib
import hmac
import html
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from typing import Annotated

import orjson
from fastapi import APIRouter, Form, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers

from loramill.producer.api.context import Api, ApiOf, Caller
from loramill.store.shelf import RecordExists

COOKIE = "loramill_session"
LIFE_S = 12 * 3600
_KIND, _ID = "secret", "sessions"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>loramill: sign in</title>
<style>:root{{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}}
main{{max-width:24rem;margin:20vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;margin:.25rem 0}}</style></head>
<body><main><h1>loramill</h1><form method="post" action="/login"><p role="alert">{said}</p>
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Sign in</button></form></main></body></html>
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

router = APIRouter(include_in_schema=False)


class Sessions:
    """Cookies say whose they are and until when, signed with a secret that all servers of a store share. One is good as
    long as its key is."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._secret: bytes | None = None

    async def make(self, name: str) -> str:
        """For the key of that name, from now. Raises StoreError."""
        until = f"{name}.{int(time.time()) + LIFE_S}"
        return f"{until}.{await self._signed(until, name)}"

    async def caller(self, cookie: str) -> Caller | None:
        """Whose it is; None for one that is not ours, or no longer good. Raises StoreError."""
        until, _, signature = cookie.rpartition(".")
        name, _, end = until.rpartition(".")
        key = self._api.keys.named(name)
        if key is None or not end.isdigit() or len(end) > 12 or int(end) < time.time():
            return None
        good = hmac.compare_digest(signature.encode(), (await self._signed(until, name)).encode())
        return key.caller(name) if good else None

    async def _signed(self, until: str, name: str) -> str:
        if self._secret is None:
            self._secret = await run_in_threadpool(self._shared_secret)
        key = self._api.keys.named(name)
        what = f"{until}.{key.sha256 if key else ''}"
        return hmac.new(self._secret, what.encode(), hashlib.sha256).hexdigest()

    def _shared_secret(self) -> bytes:
        try:
            return self._api.shelf.put(_KIND, _ID, "", orjson.dumps(secrets.token_hex(32))).data
        except RecordExists:
            return self._api.shelf.get(_KIND, _ID).data


def cookie_of(headers: Headers) -> str | None:
    """The session's, if there is one."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value


def sign_in_page(status: int, said: str = "") -> HTMLResponse:
    """The form that asks for a key."""
    return HTMLResponse(_PAGE.format(said=html.escape(said)), status, {"content-security-policy": _POLICY})


@router.post("/login")
async def login(request: Request, api: ApiOf, key: Annotated[str, Form(max_length=1000)] = "") -> Response:
    """A cookie for a key."""
    caller = api.keys.caller(key.strip() or None)
    if caller is None:
        return sign_in_page(401, "That key is not known.")
    to_page = RedirectResponse("/", 303)
    if not api.keys.open:
        made = await Sessions(api).make(caller.name)
        secure = request.url.scheme == "https"
        to_page.set_cookie(COOKIE, made, LIFE_S, path="/", httponly=True, samesite="strict", secure=secure)
    return to_page


@router.post("/logout")
async def logout() -> Response:
    """Forgets the cookie."""
    to_page = RedirectResponse("/", 303)
    to_page.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return to_page
