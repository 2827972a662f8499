"""Signing in with a browser: a key once, then a cookie that only this site's own pages can use."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from typing import Annotated

import orjson
from fastapi import APIRouter, Form, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import Headers

from loramill.producer.api.context import Api, ApiOf, Caller
from loramill.producer.api.page import login_page
from loramill.store.shelf import RecordExists

COOKIE = "loramill_session"
LIFE_S = 12 * 3600
_KIND, _ID = "secret", "sessions"

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


@router.get("/login")
async def signed_in() -> Response:
    """For who is signed in already: the gate shows the form to all others."""
    return RedirectResponse("/", 303)


@router.post("/login")
async def login(request: Request, api: ApiOf, key: Annotated[str, Form(max_length=1000)] = "") -> Response:
    """A cookie for a key."""
    caller = api.keys.caller(key.strip() or None)
    if caller is None:
        return login_page("That key is not known.")
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
