"""The page at `/`: jobs, workers and adapters as they are, without a build step and without anybody else's script."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import loramill
from loramill.producer.api import page_fleet, page_words
from loramill.producer.api.chart import HEIGHT, WIDTH
from loramill.producer.api.context import Api, ApiOf, Caller, CallerOf
from loramill.producer.api.errors import ApiError, not_found, of_store
from loramill.producer.api.page_reading import After, Reading
from loramill.producer.api.throughput import throughput_of
from loramill.store.errors import StoreError

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

_HERE = Path(__file__).parent
_STATIC = {
    path.name: (path.read_bytes(), kind)
    for path, kind in (
        (_HERE / "static" / "page.css", "text/css; charset=utf-8"),
        (_HERE / "static" / "page.js", "text/javascript; charset=utf-8"),
    )
}
_CSS = _STATIC["page.css"][0].decode()
_BUILD = hashlib.sha256(b"".join(content for content, _ in _STATIC.values())).hexdigest()[:12]
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {}; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY.format("'self'"),
    "cache-control": "no-store",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
# Nothing but the form is there for somebody without a key, so what it looks like is in it, allowed by its hash.
_SIGN_IN_STYLE = f"'sha256-{b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()}'"


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: getattr(page_words, name) for name in ("when", "iso", "short")}
    made.globals |= {
        "ago": page_words.ago,
        "left": page_words.left,
        "build": _BUILD,
        "version": loramill.__version__,
        "shown_adapters": page_fleet.SHOWN_ADAPTERS,
        "chart_width": WIDTH,
        "chart_height": HEIGHT,
    }
    return made


_TEMPLATES = _environment()


def reading_of(api: Api) -> Reading:
    """What reads the store for the pages of this server."""
    if "page" not in api.shared:
        api.shared["page"] = Reading(api, throughput_of(api))
    reading: Reading = api.shared["page"]
    return reading


def login_page(message: str | None = None) -> HTMLResponse:
    """What somebody without a key is shown, with why the last one was refused."""
    html = _TEMPLATES.get_template("login.html").render(message=message, css=_CSS)
    return HTMLResponse(html, 401, _HEADERS | {"content-security-policy": _POLICY.format(_SIGN_IN_STYLE)})


def _after(job: str | None = None, batch: str | None = None) -> After:
    return After(job or None, batch or None)


AfterOf = Annotated[After, Depends(_after)]


@router.get("/")
def overview(api: ApiOf, caller: CallerOf, after: AfterOf) -> HTMLResponse:
    """Everything at a glance."""
    return _answer("overview.html", caller, lambda: reading_of(api).overview(caller, after))


@router.get("/fragments/overview")
def overview_fragment(api: ApiOf, caller: CallerOf, after: AfterOf) -> HTMLResponse:
    """What of it changes."""
    return _answer("overview_parts.html", caller, lambda: reading_of(api).overview(caller, after))


@router.get("/jobs/{id}")
def job_page(id: str, api: ApiOf, caller: CallerOf) -> HTMLResponse:
    """One job."""
    return _answer("job.html", caller, lambda: reading_of(api).detail(caller, id))


@router.get("/fragments/jobs/{id}")
def job_fragment(id: str, api: ApiOf, caller: CallerOf) -> HTMLResponse:
    """What of it changes."""
    return _answer("job_parts.html", caller, lambda: reading_of(api).detail(caller, id))


@router.get("/static/{name}")
def static(name: str, request: Request) -> Response:
    """The page's style and script."""
    if name not in _STATIC:
        raise not_found("file", name)
    content, kind = _STATIC[name]
    headers = {"etag": f'"{_BUILD}"', "x-content-type-options": "nosniff", "cache-control": "private, no-cache"}
    # The page asks by what they hold, so that a browser need never ask again.
    if request.query_params.get("v") == _BUILD:
        headers["cache-control"] = "private, max-age=31536000, immutable"
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)


def _answer(template: str, caller: Caller, look: Callable[[], Any]) -> HTMLResponse:
    """A template of what `look` found; what went wrong as a page for people."""
    render = partial(_render, caller=caller, signed_in=bool(caller.name))
    try:
        seen = look()
    except (ApiError, StoreError) as error:
        said = of_store(error) if isinstance(error, StoreError) else error
        return render("error.html", said.status, message=said.message)
    return render(template, seen=seen)


def _render(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_TEMPLATES.get_template(template).render(**values), status, _HEADERS)
